use std::ops::Range;

use burn::{
    backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{FloatDType, Slice},
};
use burn_fsep_planner::Layout;

use super::{
    combine,
    exchange::{PendingTensor, start_host_exchange},
    experts, gradients,
    weights::ExpertWeights,
};
use crate::{
    FsepError,
    comm::{Communicator, ExchangePlan, Operation},
};

/// The computations of an MoE layer. The default bodies serve every backend; a backend replaces what it can do better.
pub trait FsepKernels: Backend {
    /// `down(silu(gate x) * up x)` of each slot on its rows. `[M, D] -> [M, D]`
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    fn fsep_experts(
        tokens: &FloatTensor<Self>,
        weights: &ExpertWeights<Self>,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsOutput<Self>, FsepError> {
        Ok(experts::forward::<Self>(tokens, weights, slot_rows))
    }

    /// Backward of [`FsepKernels::fsep_experts`].
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    fn fsep_experts_backward(
        args: ExpertsBackward<Self>,
        weights: &ExpertWeights<Self>,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsGradients<Self>, FsepError> {
        Ok(experts::backward::<Self>(args, weights, slot_rows))
    }

    /// Sums the experts' outputs of each token, weighted: `sum over k of probs[t, k] * rows[row_of[t * K + k]]`.
    /// `([T * K, D], [T * K], [T, K]) -> [T, D]`
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    ///
    /// # Safety
    ///
    /// Every index names a row of the tensor that it is an index into: kernels read there without asking.
    unsafe fn fsep_combine(
        rows: &FloatTensor<Self>,
        row_of: &IntTensor<Self>,
        probs: &FloatTensor<Self>,
    ) -> Result<FloatTensor<Self>, FsepError> {
        Ok(combine::forward::<Self>(rows, row_of, probs))
    }

    /// Backward of [`FsepKernels::fsep_combine`]. Without `rows` the gradient of `probs` is not wanted.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    ///
    /// # Safety
    ///
    /// As [`FsepKernels::fsep_combine`].
    unsafe fn fsep_combine_backward(
        grad: &FloatTensor<Self>,
        rows: Option<&FloatTensor<Self>>,
        indices: &RowIndices<Self>,
        probs: &FloatTensor<Self>,
        want_rows: bool,
    ) -> Result<CombineGradients<Self>, FsepError> {
        Ok(combine::backward::<Self>(grad, rows, indices, probs, want_rows))
    }

    /// Backward of the selection of each assignment's token: `sum over k of rows[row_of[t * K + k]]`.
    /// `([T * K, D], [T * K]) -> [T, D]`
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    ///
    /// # Safety
    ///
    /// As [`FsepKernels::fsep_combine`].
    unsafe fn fsep_sum_rows(
        rows: &FloatTensor<Self>,
        row_of: &IntTensor<Self>,
        topk: usize,
    ) -> Result<FloatTensor<Self>, FsepError> {
        Ok(combine::sum_rows::<Self>(rows, row_of, topk))
    }

    /// Sums slot gradients on the device over the replicas of each expert, in rank order and at least in single precision,
    /// and multiplies by `scale`: `[N * C * S] -> [E, S]`, of type `to`. Experts that stand nowhere get zeros.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    fn fsep_sum_replicas(
        received: FloatTensor<Self>,
        layout: &Layout,
        shard_len: usize,
        scale: f64,
        to: FloatDType,
    ) -> Result<FloatTensor<Self>, FsepError> {
        Ok(gradients::sum_on_device::<Self>(received, layout, shard_len, scale, to))
    }

    /// Starts an All-to-All-v of a tensor's elements; `plan` counts elements. The default body goes through host memory.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the tensor cannot be read, or the communicator's.
    fn fsep_start_exchange(
        tensor: FloatTensor<Self>,
        comm: &dyn Communicator,
        operation: Operation,
        plan: &ExchangePlan,
    ) -> Result<PendingTensor<Self>, FsepError> {
        start_host_exchange::<Self>(tensor, comm, operation, plan)
    }

    /// `silu(gate) * up`. `[M, 2F] -> [M, F]`, gate in the first `F` columns.
    fn fsep_swiglu(gate_up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, up) = halves::<Self>(gate_up);
        let silu = Self::float_mul(gate.clone(), Self::sigmoid(gate));
        Self::float_mul(silu, up)
    }

    /// Backward of [`FsepKernels::fsep_swiglu`]: the gradient of `gate_up` and, since backward needs it once more, the
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

#[cfg(feature = "flex")]
impl FsepKernels for burn::backend::Flex {}

/// Index tensors between assignments (`t * K + k`) and rows (assignments sorted by expert). Shape `[T * K]` each.
#[derive(Debug, Clone)]
pub struct RowIndices<B: Backend> {
    /// The row of each assignment.
    pub row_of: IntTensor<B>,
    /// The assignment of each row.
    pub assignment_of: IntTensor<B>,
    /// The token of each row: `assignment_of / K`.
    pub token_of: IntTensor<B>,
}

/// Result of the experts' forward pass.
#[derive(Debug)]
pub struct ExpertsOutput<B: Backend> {
    /// `[M, D]`
    pub output: FloatTensor<B>,
    /// What backward can use instead of computing it again; in what form is the backend's own matter.
    pub kept: Vec<FloatTensor<B>>,
}

/// Which gradients of the experts are wanted, and what they need.
#[derive(Debug)]
pub struct ExpertsBackward<B: Backend> {
    /// Inputs, `[M, D]`.
    pub tokens: FloatTensor<B>,
    /// What forward kept; `None` if it is to be computed again.
    pub kept: Option<Vec<FloatTensor<B>>>,
    /// Gradient of the output, `[M, D]`.
    pub grad: FloatTensor<B>,
    /// Whether the tokens' gradient is wanted.
    pub want_tokens: bool,
    /// Whether the weights' gradient is wanted.
    pub want_weights: bool,
}

/// Gradients of the experts' inputs; `None` where none is wanted.
#[derive(Debug)]
pub struct ExpertsGradients<B: Backend> {
    /// `[M, D]`
    pub tokens: Option<FloatTensor<B>>,
    /// Shaped as [`ExpertWeights::flat`]; zero for slots without tokens and where rows are padded.
    pub weights: Option<FloatTensor<B>>,
}

/// Gradients of the inputs of [`FsepKernels::fsep_combine`]; `None` where none is wanted.
#[derive(Debug)]
pub struct CombineGradients<B: Backend> {
    /// `[T * K, D]`
    pub rows: Option<FloatTensor<B>>,
    /// `[T, K]`
    pub probs: Option<FloatTensor<B>>,
}

fn halves<B: Backend>(gate_up: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let [rows, width] = gate_up.shape().dims();
    let half = |start: usize| [Slice::from(0..rows), Slice::from(start..start + width / 2)];
    (B::float_slice(gate_up.clone(), &half(0)), B::float_slice(gate_up, &half(width / 2)))
}
