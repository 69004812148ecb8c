use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Kind, TchError, Tensor};

use super::{
    super::types::{CombineGradients, RowIndices},
    cuda::Fused,
};

/// `sum over k of probs[t, k] * rows[row_of[t * K + k]]`. `([R, D], [T * K], [T, K]) -> [T, D]`
///
/// # Safety
///
/// Indices are less than `R`.
pub(super) unsafe fn forward(rows: &Tensor, row_of: &Tensor, probs: &Tensor) -> Result<Tensor, TchError> {
    if let Some(fused) = Fused::of(rows, rows.size()[1]) {
        // SAFETY: the caller's promise.
        return unsafe { fused.combine(rows, row_of, Some(probs), probs.size()[1]) };
    }
    let outputs = by_assignment(rows, row_of, probs)?;
    (outputs * probs.f_unsqueeze(2)?).f_sum_dim_intlist([1i64].as_slice(), false, None::<Kind>)
}

/// Backward of [`forward`]: `d_rows[row_of[t * K + k]] = probs[t, k] * grad[t]` and
/// `d_probs[t, k] = dot(rows[row_of[t * K + k]], grad[t])`.
///
/// # Safety
///
/// Indices are less than `T * K`, the number of rows.
pub(super) unsafe fn backward(
    grad: &Tensor,
    rows: Option<&Tensor>,
    indices: &RowIndices<LibTorch>,
    probs: &Tensor,
    want_rows: bool,
) -> Result<CombineGradients<LibTorch>, TchError> {
    let row_of = &indices.row_of.tensor;
    let wrap = |(rows, probs): (Option<Tensor>, Option<Tensor>)| CombineGradients {
        rows: rows.map(TchTensor::new),
        probs: probs.map(TchTensor::new),
    };
    let grad = grad.f_contiguous()?;
    if let Some(fused) = Fused::of(&grad, grad.size()[1]) {
        let sizes = [row_of.size()[0], probs.size()[1]];
        // SAFETY: the caller's promise.
        return unsafe { fused.combine_backward(&grad, rows, row_of, Some(probs), sizes, want_rows) }.map(wrap);
    }
    let by_token = grad.f_unsqueeze(1)?;
    let d_probs = match rows {
        None => None,
        Some(rows) => {
            let products = by_assignment(rows, row_of, probs)? * &by_token;
            Some(products.f_sum_dim_intlist([2i64].as_slice(), false, None::<Kind>)?)
        }
    };
    let d_rows = want_rows
        .then(|| {
            let scaled = (by_token * probs.f_unsqueeze(2)?).f_flatten(0, 1)?;
            scaled.f_index_select(0, &indices.assignment_of.tensor)
        })
        .transpose()?;
    Ok(wrap((d_rows, d_probs)))
}

/// `sum over k of rows[row_of[t * K + k]]`. `([R, D], [T * K]) -> [T, D]`
///
/// # Safety
///
/// Indices are less than `R`.
pub(super) unsafe fn sum_rows(rows: &Tensor, row_of: &Tensor, topk: i64) -> Result<Tensor, TchError> {
    let width = rows.size()[1];
    if let Some(fused) = Fused::of(rows, width) {
        // SAFETY: the caller's promise.
        return unsafe { fused.combine(rows, row_of, None, topk) };
    }
    let by_assignment = rows.f_index_select(0, row_of)?.f_view([-1, topk, width])?;
    by_assignment.f_sum_dim_intlist([1i64].as_slice(), false, None::<Kind>)
}

/// `[R, D] -> [T, K, D]`
fn by_assignment(rows: &Tensor, row_of: &Tensor, probs: &Tensor) -> Result<Tensor, TchError> {
    let [tokens, topk] = [probs.size()[0], probs.size()[1]];
    rows.f_index_select(0, row_of)?.f_view([tokens, topk, rows.size()[1]])
}
