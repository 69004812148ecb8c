#[cfg(feature = "cuda")]
use std::ops::Range;

use burn::backend::{
    ops::FloatTensorOps,
    tensor::{FloatTensor, IntTensor},
};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::{
    super::{
        ExpertActivation, FsepKernels, activation as default_activation,
        types::{CombineGradients, RowIndices},
    },
    activation, combine,
};
#[cfg(feature = "cuda")]
use super::{
    super::{
        Transposed,
        multiply::multiply,
        slot_experts,
        types::{ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput, UnfinishedGradients},
    },
    cuda,
};
use crate::FsepError;
#[cfg(all(feature = "cuda", feature = "nccl"))]
use crate::{
    comm::{Communicator, ExchangePlan, Operation},
    ops::tensor_exchange::PendingTensor,
};

impl FsepKernels for CubeBackend {
    #[cfg(feature = "cuda")]
    fn fsep_experts(
        tokens: &FloatTensor<Self>,
        weights: &ExpertWeights<Self>,
        activation: ExpertActivation,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsOutput<Self>, FsepError> {
        if cuda::experts::computes(&tokens.device, tokens.dtype) {
            cuda::experts::forward(tokens, weights, activation, slot_rows)
        } else {
            Ok(slot_experts::forward::<Self>(tokens, weights, activation, slot_rows))
        }
    }

    #[cfg(feature = "cuda")]
    fn fsep_experts_backward(
        args: ExpertsBackward<Self>,
        weights: &ExpertWeights<Self>,
        activation: ExpertActivation,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsGradients<Self>, FsepError> {
        if cuda::experts::computes(&args.tokens.device, args.tokens.dtype) {
            cuda::experts::backward(args, weights, activation, slot_rows)
        } else {
            Ok(slot_experts::backward::<Self>(args, weights, activation, slot_rows))
        }
    }

    #[cfg(feature = "cuda")]
    fn fsep_multiply(left: FloatTensor<Self>, right: FloatTensor<Self>, transposed: Transposed) -> FloatTensor<Self> {
        if cuda::product::multiplies(&left.device, [left.dtype, right.dtype]) {
            cuda::product::multiply(left, right, transposed).unwrap_or_else(|error| panic!("{error}"))
        } else {
            multiply::<Self>(left, right, transposed)
        }
    }

    #[cfg(feature = "cuda")]
    fn fsep_finish_gradients(
        unfinished: UnfinishedGradients<Self>,
        weights: &ExpertWeights<Self>,
        slot_rows: &[Range<usize>],
    ) -> Result<FloatTensor<Self>, FsepError> {
        if cuda::experts::computes(&unfinished.tokens.device, unfinished.tokens.dtype) {
            cuda::experts::finish(unfinished, weights, slot_rows)
        } else {
            Ok(slot_experts::finish::<Self>(unfinished, weights, slot_rows))
        }
    }

    #[cfg(all(feature = "cuda", feature = "nccl"))]
    fn fsep_start_exchange(
        tensor: FloatTensor<Self>,
        comm: &dyn Communicator,
        operation: Operation,
        plan: &ExchangePlan,
    ) -> Result<PendingTensor<Self>, FsepError> {
        cuda::start_exchange(tensor, comm, operation, plan)
    }

    fn fsep_activate(activation: ExpertActivation, first: FloatTensor<Self>) -> FloatTensor<Self> {
        if activation::computes(first.dtype) {
            activation::activate(activation, first)
        } else {
            default_activation::activate::<Self>(activation, first)
        }
    }

    fn fsep_activate_backward(
        activation: ExpertActivation,
        first: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if activation::computes(first.dtype) {
            activation::activate_backward(activation, first, grad)
        } else {
            default_activation::activate_backward::<Self>(activation, first, grad)
        }
    }

    unsafe fn fsep_select_rows(
        rows: FloatTensor<Self>,
        indices: &IntTensor<Self>,
    ) -> Result<FloatTensor<Self>, FsepError> {
        if !activation::computes(rows.dtype) {
            return Ok(Self::float_select(rows, 0, indices.clone()));
        }
        // The sum of one row each.
        // SAFETY: the caller's.
        Ok(unsafe { combine::sum_rows(rows, indices.clone(), None, 1) })
    }

    unsafe fn fsep_combine(
        rows: &FloatTensor<Self>,
        row_of: &IntTensor<Self>,
        probs: &FloatTensor<Self>,
    ) -> Result<FloatTensor<Self>, FsepError> {
        if !activation::computes(rows.dtype) {
            return Ok(super::super::combine::forward::<Self>(rows, row_of, probs));
        }
        let topk = probs.meta.shape()[1];
        // SAFETY: the caller's.
        Ok(unsafe { combine::sum_rows(rows.clone(), row_of.clone(), Some(probs.clone()), topk) })
    }

    unsafe fn fsep_combine_backward(
        grad: &FloatTensor<Self>,
        rows: Option<&FloatTensor<Self>>,
        indices: &RowIndices<Self>,
        probs: &FloatTensor<Self>,
        want_rows: bool,
    ) -> Result<CombineGradients<Self>, FsepError> {
        if !activation::computes(grad.dtype) {
            return Ok(super::super::combine::backward::<Self>(grad, rows, indices, probs, want_rows));
        }
        let topk = probs.meta.shape()[1];
        let dot_rows = |rows: &CubeTensor| {
            // SAFETY: the caller's.
            unsafe { combine::dot_rows(grad.clone(), rows.clone(), indices.row_of.clone(), topk, probs.dtype) }
        };
        let d_probs = rows.map(dot_rows);
        // SAFETY: the caller's.
        let spread_rows =
            || unsafe { combine::spread_rows(grad.clone(), indices.assignment_of.clone(), probs.clone()) };
        let d_rows = want_rows.then(spread_rows);
        Ok(CombineGradients { rows: d_rows, probs: d_probs })
    }

    unsafe fn fsep_sum_rows(
        rows: &FloatTensor<Self>,
        row_of: &IntTensor<Self>,
        topk: usize,
    ) -> Result<FloatTensor<Self>, FsepError> {
        if !activation::computes(rows.dtype) {
            return Ok(super::super::combine::sum_rows::<Self>(rows, row_of, topk));
        }
        // SAFETY: the caller's.
        Ok(unsafe { combine::sum_rows(rows.clone(), row_of.clone(), None, topk) })
    }
}
