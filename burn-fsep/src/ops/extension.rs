use std::sync::Arc;

use burn::{
    backend::{
        Backend, Dispatch, TensorMetadata, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Slice, Tensor},
};

use super::{MoeStep, moe::moe_forward};

/// What an MoE layer needs of a backend.
///
/// The default bodies serve every backend; they carry tensors through host memory to communicate. A backend replaces
/// what it can do better. `Autodiff` replaces [`FsepOps::fsep_moe`] by the same operation with its backward pass.
#[backend_extension(Flex: cfg(feature = "flex"), Autodiff)]
pub trait FsepOps: Backend {
    /// A whole MoE layer after its router: permute, All-to-All, experts on restored weights, All-to-All back,
    /// weighted combine.
    ///
    /// It is one operation so that all its collectives run in one fixed order in forward and backward on every rank,
    /// also on ranks and slots without a token, and so that backward can restore the weights again instead of
    /// keeping them.
    ///
    /// - `hidden`: `[T, D]`
    /// - `probs`: `[T, K]`, the weight of each assignment
    /// - `weights`: `[E, S]` shards or `[E / N, P]` resident experts, as the step's [`WeightStorage`] says
    /// - `row_of`: `[T * K]`, the row of assignment `t * K + k` among the assignments sorted by expert
    /// - `assignment_of`: `[T * K]`, the inverse
    /// - `token_of`: `[T * K]`, the token of each row: `assignment_of / K`
    /// - result: `[T, D]`
    ///
    /// # Panics
    ///
    /// If a collective fails; [`MoeStep::runtime`] then holds the typed error, and
    /// [`FsepRuntime::run`](crate::FsepRuntime::run) returns it.
    ///
    /// [`WeightStorage`]: super::WeightStorage
    fn fsep_moe(
        hidden: FloatTensor<Self>,
        probs: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of: IntTensor<Self>,
        assignment_of: IntTensor<Self>,
        token_of: IntTensor<Self>,
        step: Arc<MoeStep>,
    ) -> FloatTensor<Self> {
        let rows = super::moe::RowIndices { row_of, assignment_of, token_of };
        moe_forward::<Self>(hidden, probs, weights, rows, step, Default::default()).output
    }

    /// `silu(gate) * up`. `[M, 2F] -> [M, F]`, gate in the first `F` columns.
    fn fsep_swiglu(gate_up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, up) = halves::<Self>(gate_up);
        let silu = Self::float_mul(gate.clone(), Self::sigmoid(gate));
        Self::float_mul(silu, up)
    }

    /// Backward of [`FsepOps::fsep_swiglu`]: the gradient of `gate_up` and, since backward needs it once more, the
    /// output. `([M, 2F], [M, F]) -> ([M, 2F], [M, F])`.
    fn fsep_swiglu_backward(
        gate_up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (gate, up) = halves::<Self>(gate_up);
        let sigmoid = Self::sigmoid(gate.clone());
        let silu = Self::float_mul(gate.clone(), sigmoid.clone());
        let output = Self::float_mul(silu.clone(), up.clone());
        // d silu = sigmoid + silu * (1 - sigmoid)
        let rest = Self::float_add_scalar(Self::float_neg(sigmoid.clone()), 1.0.into());
        let d_silu = Self::float_add(sigmoid, Self::float_mul(silu.clone(), rest));
        let d_gate = Self::float_mul(Self::float_mul(grad.clone(), up), d_silu);
        let d_up = Self::float_mul(grad, silu);
        (Self::float_cat(vec![d_gate, d_up], 1), output)
    }
}

fn halves<B: Backend>(gate_up: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let [rows, width] = gate_up.shape().dims();
    let half = |start: usize| [Slice::from(0..rows), Slice::from(start..start + width / 2)];
    (B::float_slice(gate_up.clone(), &half(0)), B::float_slice(gate_up, &half(width / 2)))
}

/// [`FsepOps::fsep_moe`] for tensors of any supported device.
///
/// # Panics
///
/// As [`FsepOps::fsep_moe`]; if the tensors' backend is not one that this crate was built for.
pub fn moe(
    hidden: Tensor<2>,
    probs: Tensor<2>,
    weights: Tensor<2>,
    row_of: Tensor<1, Int>,
    assignment_of: Tensor<1, Int>,
    token_of: Tensor<1, Int>,
    step: Arc<MoeStep>,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FsepOps>::fsep_moe(
        hidden.into_dispatch(),
        probs.into_dispatch(),
        weights.into_dispatch(),
        row_of.into_dispatch(),
        assignment_of.into_dispatch(),
        token_of.into_dispatch(),
        step,
    ))
}
