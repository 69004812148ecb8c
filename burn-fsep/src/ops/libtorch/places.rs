use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{TchError, Tensor};

use super::{
    super::{places, types::CombineGradients},
    cuda::Fused,
};

/// As [`FsepKernels::fsep_sum_places`](super::super::FsepKernels::fsep_sum_places).
///
/// # Safety
///
/// Places are less than the number of rows.
pub(super) unsafe fn sum(
    rows: &TchTensor,
    places: &TchTensor,
    weights: Option<&TchTensor>,
    topk: usize,
) -> Result<TchTensor, TchError> {
    let Some(fused) = Fused::of(&rows.tensor, rows.tensor.size()[1]) else {
        return Ok(places::sum::<LibTorch>(rows, places, weights, topk));
    };
    let weights = weights.map(|weights| &weights.tensor);
    // SAFETY: the caller's promise.
    let sums = unsafe { fused.combine(&rows.tensor, &places.tensor, weights, topk as i64) };
    sums.map(TchTensor::new)
}

/// As [`FsepKernels::fsep_spread_rows`](super::super::FsepKernels::fsep_spread_rows).
///
/// # Safety
///
/// Places are less than `num_rows`, the number of rows of `outputs`.
pub(super) unsafe fn spread(
    rows: &TchTensor,
    outputs: Option<&TchTensor>,
    places: &TchTensor,
    weights: Option<&TchTensor>,
    [num_rows, topk]: [usize; 2],
    want_rows: bool,
) -> Result<CombineGradients<LibTorch>, TchError> {
    let contiguous = |tensor: &TchTensor| tensor.tensor.f_contiguous();
    let (grad, outputs_there) = (contiguous(rows)?, outputs.map(contiguous).transpose()?);
    let Some(fused) = Fused::of(&grad, grad.size()[1]) else {
        return Ok(places::spread::<LibTorch>(rows, outputs, places, weights, [num_rows, topk], want_rows));
    };
    let (sizes, weights) = ([num_rows as i64, topk as i64], weights.map(|weights| &weights.tensor));
    // SAFETY: the caller's promise.
    let (spread, d_weights) =
        unsafe { fused.combine_backward(&grad, outputs_there.as_ref(), &places.tensor, weights, sizes, want_rows) }?;
    let as_weights = |gradient: Tensor| match weights {
        Some(weights) => gradient.f_to_kind(weights.kind()),
        None => Ok(gradient),
    };
    let probs = d_weights.map(as_weights).transpose()?.map(TchTensor::new);
    Ok(CombineGradients { rows: spread.map(TchTensor::new), probs })
}
