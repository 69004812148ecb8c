//! Tokens that travel once for each of their experts: rows are assignments sorted by expert.

use burn::backend::tensor::FloatTensor;

use super::{
    ChunkDispatch, FsepKernels, LayerPass,
    row_exchange::{GRADIENTS_OUT, TOKENS_OUT, TravellingRows, start_rows},
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
    chunk: &ChunkDispatch,
) -> Result<TravellingRows<B>, FsepError> {
    // SAFETY: `token_of` has each assignment's number divided by K, so its indices are below T, the number of rows.
    let permuted = unsafe { B::fsep_select_rows(hidden, &rows.token_of) }?;
    start_rows::<B>(permuted, pass, &chunk.tokens, TOKENS_OUT)
}

/// Rows of the slots, `[M, D]`, on their way back: outputs or gradients.
pub(super) fn start_back<B: FsepKernels>(
    rows: FloatTensor<B>,
    pass: &LayerPass,
    chunk: &ChunkDispatch,
    name: &'static str,
) -> Result<TravellingRows<B>, FsepError> {
    start_rows::<B>(rows, pass, &chunk.tokens.reversed(), name)
}

/// The experts' outputs by row, `[T * K, D]`, and combined, `[T, D]`, when they have come.
pub(super) fn combine<B: FsepKernels>(
    returning: TravellingRows<B>,
    rows: &RowIndices<B>,
    probs: &FloatTensor<B>,
) -> Result<[FloatTensor<B>; 2], FsepError> {
    let returned = returning.wait()?;
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
    chunk: &ChunkDispatch,
    want_rows: bool,
) -> Result<Gradients<B>, FsepError> {
    // SAFETY: as in `combine`.
    let gradients = unsafe { B::fsep_combine_backward(&grad, outputs.as_ref(), rows, probs, want_rows) }?;
    drop((grad, outputs));
    let CombineGradients { rows: d_rows, probs: d_probs } = gradients;
    let start = |rows| start_rows::<B>(rows, pass, &chunk.tokens, GRADIENTS_OUT);
    Ok((d_rows.map(start).transpose()?, d_probs))
}

/// Gradients of the experts' inputs, summed by token when they have come. `[T, D]`
pub(super) fn sum_gradients<B: FsepKernels>(
    returning: TravellingRows<B>,
    rows: &RowIndices<B>,
    pass: &LayerPass,
) -> Result<FloatTensor<B>, FsepError> {
    let returned = returning.wait()?;
    // SAFETY: as in `combine`.
    unsafe { B::fsep_sum_rows(&returned, &rows.row_of, pass.spec.topk) }
}
