use std::ops::Range;

use burn::{backend::LibTorch, tensor::FloatDType};
use burn_fsep_planner::Layout;
use burn_tch::TchTensor;
use tch::TchError;

use super::{
    super::{
        ExpertActivation, FsepKernels,
        replicas::sum_on_device,
        tensor_exchange::PendingTensor,
        types::{
            CombineGradients, ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput, RowIndices,
            UnfinishedGradients,
        },
    },
    combine,
    cuda::Fused,
    device_exchange, experts, places,
};
use crate::{
    FsepError,
    comm::{Communicator, ExchangePlan, Operation},
};

impl FsepKernels for LibTorch {
    fn fsep_experts(
        tokens: &TchTensor,
        weights: &ExpertWeights<Self>,
        activation: ExpertActivation,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsOutput<Self>, FsepError> {
        experts::forward(&tokens.tensor, weights, activation, slot_rows).map_err(device_error)
    }

    fn fsep_experts_backward(
        args: ExpertsBackward<Self>,
        weights: &ExpertWeights<Self>,
        activation: ExpertActivation,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsGradients<Self>, FsepError> {
        experts::backward(args, weights, activation, slot_rows).map_err(device_error)
    }

    fn fsep_finish_gradients(
        unfinished: UnfinishedGradients<Self>,
        weights: &ExpertWeights<Self>,
        slot_rows: &[Range<usize>],
    ) -> Result<TchTensor, FsepError> {
        experts::finish(unfinished, weights, slot_rows).map_err(device_error)
    }

    unsafe fn fsep_combine(rows: &TchTensor, row_of: &TchTensor, probs: &TchTensor) -> Result<TchTensor, FsepError> {
        // SAFETY: the caller's promise.
        let output = unsafe { combine::forward(&rows.tensor, &row_of.tensor, &probs.tensor) };
        output.map(TchTensor::new).map_err(device_error)
    }

    unsafe fn fsep_combine_backward(
        grad: &TchTensor,
        rows: Option<&TchTensor>,
        indices: &RowIndices<Self>,
        probs: &TchTensor,
        want_rows: bool,
    ) -> Result<CombineGradients<Self>, FsepError> {
        let rows = rows.map(|rows| &rows.tensor);
        // SAFETY: the caller's promise.
        unsafe { combine::backward(&grad.tensor, rows, indices, &probs.tensor, want_rows) }.map_err(device_error)
    }

    unsafe fn fsep_sum_rows(rows: &TchTensor, row_of: &TchTensor, topk: usize) -> Result<TchTensor, FsepError> {
        // SAFETY: the caller's promise.
        let sums = unsafe { combine::sum_rows(&rows.tensor, &row_of.tensor, topk as i64) };
        sums.map(TchTensor::new).map_err(device_error)
    }

    unsafe fn fsep_sum_places(
        rows: &TchTensor,
        places: &TchTensor,
        weights: Option<&TchTensor>,
        topk: usize,
    ) -> Result<TchTensor, FsepError> {
        // SAFETY: the caller's promise.
        unsafe { places::sum(rows, places, weights, topk) }.map_err(device_error)
    }

    unsafe fn fsep_spread_rows(
        rows: &TchTensor,
        outputs: Option<&TchTensor>,
        places: &TchTensor,
        weights: Option<&TchTensor>,
        sizes: [usize; 2],
        want_rows: bool,
    ) -> Result<CombineGradients<Self>, FsepError> {
        // SAFETY: the caller's promise.
        unsafe { places::spread(rows, outputs, places, weights, sizes, want_rows) }.map_err(device_error)
    }

    fn fsep_sum_replicas(
        received: TchTensor,
        layout: &Layout,
        shard_len: usize,
        scale: f64,
        to: FloatDType,
    ) -> Result<TchTensor, FsepError> {
        match Fused::sum_replicas(&received.tensor, layout, shard_len, scale, to).map_err(device_error)? {
            Some(sums) => Ok(TchTensor::new(sums)),
            None => Ok(sum_on_device::<Self>(received, layout, shard_len, scale, to)),
        }
    }

    fn fsep_start_exchange(
        tensor: TchTensor,
        comm: &dyn Communicator,
        operation: Operation,
        plan: &ExchangePlan,
    ) -> Result<PendingTensor<Self>, FsepError> {
        device_exchange::start(tensor, comm, operation, plan)
    }
}

pub(super) fn device_error(error: TchError) -> FsepError {
    FsepError::Device(error.to_string())
}
