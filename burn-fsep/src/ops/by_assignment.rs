//! Tokens that travel once for each of their experts: rows are assignments sorted by expert.

use burn::backend::tensor::FloatTensor;

use super::{
    FsepKernels, LayerPass,
    row_exchange::{GRADIENTS_BACK, GRADIENTS_OUT, TOKENS_BACK, TOKENS_OUT, TravellingRows, exchange_rows, start_rows},
    types::{CombineGradients, RowIndices},
};
use crate::FsepError;

/// Of the rows, on their way, and of the probabilities; each if it is wanted.
type Gradients<B> = (Option<TravellingRows<B>>, Option<FloatTensor<B>>);

/// `[T, D]` to `[M, D]` of other ranks.
pub(super) fn start_tokens<B: FsepKernels>(
    hidden: FloatTensor<B>,
    rows: &RowIndices<B>,
    pass: &LayerPass,
) -> Result<TravellingRows<B>, FsepError> {
    // SAFETY: `token_of` has each assignment's number divided by K, so its indices are below T, the number of rows.
    let permuted = unsafe { B::fsep_select_rows(hidden, &rows.token_of) }?;
    start_rows::<B>(permuted, pass, &pass.dispatch.tokens, TOKENS_OUT)
}

/// The experts' outputs, `[M, D]`, back by row, `[T * K, D]`, and combined, `[T, D]`.
pub(super) fn combine<B: FsepKernels>(
    outputs: FloatTensor<B>,
    rows: &RowIndices<B>,
    probs: &FloatTensor<B>,
    pass: &LayerPass,
) -> Result<[FloatTensor<B>; 2], FsepError> {
    let returned = exchange_rows::<B>(outputs, pass, &pass.dispatch.tokens.reversed(), TOKENS_BACK)?;
    // SAFETY: `row_of` is the permutation that sorted this rank's T * K assignments, so its indices are below T * K, and
    // `returned` has that many rows: each exchange refuses a tensor that has not the elements that its plan sends, so the
    // plan sends the T * K permuted rows, and the reversed plan receives as many as the plan sends.
    let output = unsafe { B::fsep_combine(&returned, &rows.row_of, probs) }?;
    Ok([returned, output])
}

/// Gradients of the rows on their way to the experts, if wanted, and of the probabilities, if there are `outputs`,
/// `[T * K, D]`. `grad`: `[T, D]`
pub(super) fn start_gradients<B: FsepKernels>(
    grad: FloatTensor<B>,
    outputs: Option<FloatTensor<B>>,
    rows: &RowIndices<B>,
    probs: &FloatTensor<B>,
    pass: &LayerPass,
    want_rows: bool,
) -> Result<Gradients<B>, FsepError> {
    // SAFETY: as in `combine`.
    let gradients = unsafe { B::fsep_combine_backward(&grad, outputs.as_ref(), rows, probs, want_rows) }?;
    drop((grad, outputs));
    let CombineGradients { rows: d_rows, probs: d_probs } = gradients;
    let start = |rows| start_rows::<B>(rows, pass, &pass.dispatch.tokens, GRADIENTS_OUT);
    Ok((d_rows.map(start).transpose()?, d_probs))
}

/// Gradients of the experts' inputs, `[M, D]`, back and summed by token, `[T, D]`.
pub(super) fn sum_gradients<B: FsepKernels>(
    gradients: FloatTensor<B>,
    rows: &RowIndices<B>,
    pass: &LayerPass,
) -> Result<FloatTensor<B>, FsepError> {
    let returned = exchange_rows::<B>(gradients, pass, &pass.dispatch.tokens.reversed(), GRADIENTS_BACK)?;
    // SAFETY: as in `combine`.
    unsafe { B::fsep_sum_rows(&returned, &rows.row_of, pass.spec.topk) }
}
