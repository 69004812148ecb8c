//! The experts' activations: fused kernels for bf16 on a GPU, LibTorch's operations in place elsewhere.

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{TchError, Tensor};

use super::{
    super::{ExpertActivation, activation},
    cuda::Fused,
};

/// Gate, if there is one, and up, side by side. `[M, 2F or F] -> [M, F]`
pub(super) fn activate(activation: ExpertActivation, first: &Tensor, ffn: i64) -> Result<Tensor, TchError> {
    if let Some(fused) = Fused::of(first, ffn) {
        return fused.activate(activation, first, ffn);
    }
    if activation != ExpertActivation::SwiGlu {
        // This handle outlives the operations, so that none of them takes `first`, which backward needs, for a tensor of its own
        // to write into.
        let first = TchTensor::new(first.shallow_clone());
        return Ok(activation::activate::<LibTorch>(activation, first.clone()).tensor);
    }
    let [gate, up] = halves(first, ffn)?;
    gate.f_silu()?.f_mul_(&up)
}

/// Gradient of the input, and the output once more. `([M, 2F or F], [M, F]) -> ([M, 2F or F], [M, F])`
pub(super) fn backward(
    activation: ExpertActivation,
    first: &Tensor,
    mut grad: Tensor,
) -> Result<(Tensor, Tensor), TchError> {
    let ffn = grad.size()[1];
    if let Some(fused) = Fused::of(first, ffn) {
        return fused.activate_backward(activation, first, &grad);
    }
    if activation != ExpertActivation::SwiGlu {
        // As in forward.
        let first = TchTensor::new(first.shallow_clone());
        let grad = TchTensor::new(grad);
        let (d_first, hidden) = activation::activate_backward::<LibTorch>(activation, first.clone(), grad);
        return Ok((d_first.tensor, hidden.tensor));
    }
    let [gate, up] = halves(first, ffn)?;
    let d_first = first.f_empty_like()?;
    let [d_gate, d_up] = halves(&d_first, ffn)?;
    let mut silu = gate.f_silu()?;
    let _ = grad.f_mul_out(&d_up, &silu)?;
    let hidden = silu.f_mul_(&up)?;
    let d_silu = grad.f_mul_(&up)?;
    let _ = gate.f_silu_backward_grad_input(&d_gate, &d_silu)?;
    Ok((d_first, hidden))
}

fn halves(gate_up: &Tensor, ffn: i64) -> Result<[Tensor; 2], TchError> {
    Ok([gate_up.f_narrow(1, 0, ffn)?, gate_up.f_narrow(1, ffn, ffn)?])
}
