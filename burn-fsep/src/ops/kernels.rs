use std::ops::Range;

use burn::{
    backend::tensor::{FloatTensor, IntTensor},
    tensor::FloatDType,
};
use burn_fsep_planner::Layout;

use super::{
    ExpertActivation, FsepDeviceOps, Transposed, activation, combine,
    multiply::multiply,
    places, replicas, slot_experts,
    tensor_exchange::{PendingTensor, start_host_exchange},
    types::{
        CombineGradients, ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput, RowIndices,
        UnfinishedGradients,
    },
};
use crate::{
    FsepError,
    comm::{Communicator, ExchangePlan, Operation},
};

/// The computations of an MoE layer. The default bodies serve every backend; a backend replaces what it can do better.
pub trait FsepKernels: FsepDeviceOps {
    /// `down(activation(gate x, up x))` of each slot on its rows. `[M, D] -> [M, D]`
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    fn fsep_experts(
        tokens: &FloatTensor<Self>,
        weights: &ExpertWeights<Self>,
        activation: ExpertActivation,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsOutput<Self>, FsepError> {
        Ok(slot_experts::forward::<Self>(tokens, weights, activation, slot_rows))
    }

    /// Backward of [`FsepKernels::fsep_experts`].
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    fn fsep_experts_backward(
        args: ExpertsBackward<Self>,
        weights: &ExpertWeights<Self>,
        activation: ExpertActivation,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsGradients<Self>, FsepError> {
        Ok(slot_experts::backward::<Self>(args, weights, activation, slot_rows))
    }

    /// A product of two matrices of one type, one of them transposed or neither. For router and shared expert, which have to come
    /// after what was queued before as Burn's own products do.
    fn fsep_multiply(left: FloatTensor<Self>, right: FloatTensor<Self>, transposed: Transposed) -> FloatTensor<Self> {
        multiply::<Self>(left, right, transposed)
    }

    /// The rest of [`FsepKernels::fsep_experts_backward`]: gradients shaped as [`ExpertWeights::flat`], zero for slots without tokens
    /// and where rows are padded.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    fn fsep_finish_gradients(
        unfinished: UnfinishedGradients<Self>,
        weights: &ExpertWeights<Self>,
        slot_rows: &[Range<usize>],
    ) -> Result<FloatTensor<Self>, FsepError> {
        Ok(slot_experts::finish::<Self>(unfinished, weights, slot_rows))
    }

    /// The activation of the first projection's output: gate, if there is one, and up, side by side. For the default bodies of the
    /// experts. `[M, 2F or F] -> [M, F]`
    fn fsep_activate(activation: ExpertActivation, first: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::activate::<Self>(activation, first)
    }

    /// Backward of [`FsepKernels::fsep_activate`]: the gradient of the first projection's output and, since backward needs it
    /// once more, the activation. `([M, 2F or F], [M, F]) -> ([M, 2F or F], [M, F])`
    fn fsep_activate_backward(
        activation: ExpertActivation,
        first: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        activation::activate_backward::<Self>(activation, first, grad)
    }

    /// The rows that indices name: each assignment's token. `([T, D], [M]) -> [M, D]`
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    ///
    /// # Safety
    ///
    /// As [`FsepKernels::fsep_combine`].
    unsafe fn fsep_select_rows(
        rows: FloatTensor<Self>,
        indices: &IntTensor<Self>,
    ) -> Result<FloatTensor<Self>, FsepError> {
        Ok(Self::float_select(rows, 0, indices.clone()))
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

    /// Sums the rows at up to `topk` places each, weighted if there are weights, at least in single precision:
    /// `sum over k of weights[u, k] * rows[places[u * K + k]]`, without the places below 0.
    /// `([R, D], [U * K], [U, K]) -> [U, D]`
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    ///
    /// # Safety
    ///
    /// Every place is below `R`: kernels read there without asking.
    unsafe fn fsep_sum_places(
        rows: &FloatTensor<Self>,
        places: &IntTensor<Self>,
        weights: Option<&FloatTensor<Self>>,
        topk: usize,
    ) -> Result<FloatTensor<Self>, FsepError> {
        Ok(places::sum::<Self>(rows, places, weights, topk))
    }

    /// The transpose of [`FsepKernels::fsep_sum_places`]: `spread[places[u * K + k]] = weights[u, k] * rows[u]`, of `num_rows`
    /// rows, if wanted; and where there are `outputs`, `[R, D]`, the weights' gradients
    /// `dot(outputs[places[u * K + k]], rows[u])`, 0 where the place is below 0, of the type of the weights.
    /// `([U, D], [U * K], [U, K]) -> ([R, D], [U, K])`
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the backend cannot compute it.
    ///
    /// # Safety
    ///
    /// Every place is below `num_rows`, the number of rows of `outputs`; each of these rows is named by one place.
    unsafe fn fsep_spread_rows(
        rows: &FloatTensor<Self>,
        outputs: Option<&FloatTensor<Self>>,
        places: &IntTensor<Self>,
        weights: Option<&FloatTensor<Self>>,
        [num_rows, topk]: [usize; 2],
        want_rows: bool,
    ) -> Result<CombineGradients<Self>, FsepError> {
        Ok(places::spread::<Self>(rows, outputs, places, weights, [num_rows, topk], want_rows))
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
        Ok(replicas::sum_on_device::<Self>(received, layout, shard_len, scale, to))
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
}

#[cfg(feature = "flex")]
impl FsepKernels for burn::backend::Flex {}
