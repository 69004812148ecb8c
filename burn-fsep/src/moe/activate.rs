use std::f64::consts::FRAC_1_SQRT_2;

use burn::tensor::{
    Tensor,
    activation::{relu, sigmoid, silu},
};

use crate::ops::ExpertActivation;

/// The experts' nonlinearity in Burn's own differentiable operations. `([m, F], [m, F]) -> [m, F]`
///
/// # Panics
///
/// If a gated activation has no gate.
pub(super) fn activate(activation: ExpertActivation, gate: Option<Tensor<2>>, up: Tensor<2>) -> Tensor<2> {
    let gated = |gate: Option<Tensor<2>>| gate.expect("an activation with a gate has a gate");
    match activation {
        ExpertActivation::SwiGlu => silu(gated(gate)) * up,
        ExpertActivation::ClampedSwiGlu { alpha, limit } => {
            let gate = gated(gate).clamp_max(limit);
            (gate.clone() * sigmoid(gate * alpha)) * (up.clamp(-limit, limit) + 1.0)
        }
        ExpertActivation::Geglu => gelu(gated(gate)) * up,
        ExpertActivation::Gelu => gelu(up),
        ExpertActivation::ReluSquared => relu(up).square(),
    }
}

/// The exact GELU. Not Burn's, whose backward is, on most backends, that of an approximation.
fn gelu(x: Tensor<2>) -> Tensor<2> {
    x.clone() * ((x * FRAC_1_SQRT_2).erf() + 1.0) * 0.5
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn value(activation: ExpertActivation, gate: f32, up: f32) -> f32 {
        let tensor = |value: f32| Tensor::<2>::from_data(TensorData::new(vec![value], [1, 1]), &Device::flex());
        activate(activation, activation.is_gated().then(|| tensor(gate)), tensor(up)).into_scalar()
    }

    /// Values of transformers' GPT-OSS, and of the formulas.
    #[test]
    fn activations_have_their_values() {
        let clamped = ExpertActivation::ClampedSwiGlu { alpha: 1.702, limit: 7.0 };
        for (activation, [gate, up], expected) in [
            (clamped, [1.0, 0.0], 0.845796),
            (clamped, [10.0, 10.0], 55.999625),
            (clamped, [0.5, -1.0], 0.0),
            (ExpertActivation::SwiGlu, [1.0, 2.0], 1.462117),
            (ExpertActivation::Geglu, [1.0, 2.0], 1.682689),
            (ExpertActivation::Gelu, [0.0, -1.0], -0.158655),
            (ExpertActivation::ReluSquared, [0.0, 3.0], 9.0),
            (ExpertActivation::ReluSquared, [0.0, -3.0], 0.0),
        ] {
            let actual = value(activation, gate, up);
            assert!(
                (actual - expected).abs() <= 1e-6 * expected.abs().max(1.0),
                "{activation:?}: {actual}, not {expected}"
            );
        }
    }
}
