//! Tokens that travel once to each rank that computes any of their experts. The rank spreads them over its slots' rows, and
//! weighs and sums what its experts make of a token, so that one row comes back.

use burn::{
    backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, FloatDType, Shape, Slice},
};

use super::{
    ChunkDispatch, FsepKernels, LayerPass, RankRows,
    row_exchange::{
        GRADIENTS_BACK, GRADIENTS_OUT, PROBS_BACK, ROUTES_OUT, TOKENS_BACK, TOKENS_OUT, TravellingRows, start_rows,
    },
    row_order::{arange, bool_dtype},
    types::{CombineGradients, cast},
};
use crate::{FsepError, comm::ExchangePlan};

/// Index tensors of [`RankRows`].
#[derive(Debug, Clone)]
pub(super) struct RankRowIndices<B: Backend> {
    pub row_of: IntTensor<B>,
    pub places: IntTensor<B>,
    pub token_of: IntTensor<B>,
}

/// What came with the tokens of other ranks.
#[derive(Debug, Clone)]
pub(super) struct Routes<B: Backend> {
    /// Each row's rows among this rank's slot rows; -1 for none. `[U * K]`
    places: IntTensor<B>,
    /// Their weights, at least in single precision. `[U, K]`
    weights: FloatTensor<B>,
}

/// Tokens on their way to other ranks, and the routes of these.
pub(super) struct Travelling<B: Backend> {
    tokens: TravellingRows<B>,
    routes: TravellingRows<B>,
}

/// Of the slots' rows, and of the weights, on their way back; each if it is wanted.
type Gradients<B> = (Option<FloatTensor<B>>, Option<TravellingRows<B>>);

fn exchange(chunk: &ChunkDispatch) -> &ExchangePlan {
    let RankRows { exchange, .. } = chunk.rank_rows.as_ref().expect("a chunk by rank has rows by rank");
    exchange
}

/// `[T, D]` to `[U, D]` of other ranks.
pub(super) fn start_tokens<B: FsepKernels>(
    hidden: FloatTensor<B>,
    probs: &FloatTensor<B>,
    rows: &RankRowIndices<B>,
    pass: &LayerPass,
    chunk: &ChunkDispatch,
) -> Result<Travelling<B>, FsepError> {
    let tokens = B::float_select(hidden, 0, rows.token_of.clone());
    let tokens = start_rows::<B>(tokens, pass, exchange(chunk), TOKENS_OUT)?;
    // One exchange for both: a place is exact in single precision, since no pass by rank has 2^24 slot rows.
    let dtype = if probs.dtype() == DType::F64 { FloatDType::F64 } else { FloatDType::F32 };
    let weights = cast::<B>(B::float_select(probs.clone(), 0, rows.token_of.clone()), Some(dtype));
    let places = B::float_reshape(B::int_into_float(rows.places.clone(), dtype), weights.shape());
    let routes = if weights.shape()[0] == 0 {
        B::float_zeros(Shape::new([0, 2 * pass.spec.topk]), &weights.device(), dtype)
    } else {
        B::float_cat(vec![weights, places], 1)
    };
    let routes = start_rows::<B>(routes, pass, exchange(chunk), ROUTES_OUT)?;
    Ok(Travelling { tokens, routes })
}

impl<B: FsepKernels> Travelling<B> {
    /// Tokens by slot, `[M, D]`, and what they came with.
    pub fn wait(
        self,
        rows: &RankRowIndices<B>,
        pass: &LayerPass,
        chunk: &ChunkDispatch,
    ) -> Result<(FloatTensor<B>, Routes<B>), FsepError> {
        let (tokens, received) = (self.tokens.wait()?, self.routes.wait()?);
        let (num_rows, topk, num_slot_rows) = (received.shape()[0], pass.spec.topk, chunk.num_slot_rows());
        let half = |start: usize| {
            B::float_slice(received.clone(), &[Slice::from(0..num_rows), Slice::from(start..start + topk)])
        };
        let places = B::float_reshape(half(topk), Shape::new([num_rows * topk]));
        let places = B::float_into_int(places, rows.places.dtype().into());
        // They came from other ranks: what is no place of this rank is none. That each slot row is named once follows from the
        // dispatch, which all ranks have computed alike.
        let bools = bool_dtype::<B>(&places.device());
        let is_outside = B::int_greater_equal_elem(places.clone(), (num_slot_rows as i64).into(), bools);
        let routes = Routes { places: B::int_mask_fill(places, is_outside, (-1i64).into()), weights: half(0) };
        // SAFETY: places are below the number of slot rows.
        let spread = unsafe { B::fsep_spread_rows(&tokens, None, &routes.places, None, [num_slot_rows, topk], true) }?;
        Ok((wanted(spread.rows, pass, "spread of tokens in forward")?, routes))
    }
}

/// The experts' outputs, `[M, D]`, weighed and summed by row, on their way back.
pub(super) fn return_outputs<B: FsepKernels>(
    outputs: &FloatTensor<B>,
    routes: &Routes<B>,
    pass: &LayerPass,
    chunk: &ChunkDispatch,
) -> Result<TravellingRows<B>, FsepError> {
    // SAFETY: places are below the number of slot rows, which `outputs` has.
    let sums = unsafe { B::fsep_sum_places(outputs, &routes.places, Some(&routes.weights), pass.spec.topk) }?;
    start_back::<B>(sums, pass, chunk, TOKENS_BACK)
}

/// The gradients of the tokens' rows, on their way to the experts. `[T, D]` to `[U, D]` of other ranks.
pub(super) fn start_gradients<B: FsepKernels>(
    grad: FloatTensor<B>,
    rows: &RankRowIndices<B>,
    pass: &LayerPass,
    chunk: &ChunkDispatch,
) -> Result<TravellingRows<B>, FsepError> {
    let gradients = B::float_select(grad, 0, rows.token_of.clone());
    start_rows::<B>(gradients, pass, exchange(chunk), GRADIENTS_OUT)
}

/// Gradients of the experts' outputs, `[M, D]`, if wanted, and of the weights, on their way back, if there are `outputs`,
/// `[M, D]`. `gradients`: `[U, D]`
pub(super) fn spread_gradients<B: FsepKernels>(
    gradients: FloatTensor<B>,
    outputs: Option<&FloatTensor<B>>,
    routes: &Routes<B>,
    pass: &LayerPass,
    chunk: &ChunkDispatch,
    want_rows: bool,
) -> Result<Gradients<B>, FsepError> {
    let sizes = [chunk.num_slot_rows(), pass.spec.topk];
    let Routes { places, weights } = routes;
    // SAFETY: places are below the number of slot rows, which `outputs` has.
    let spread = unsafe { B::fsep_spread_rows(&gradients, outputs, places, Some(weights), sizes, want_rows) }?;
    let CombineGradients { rows, probs } = spread;
    let start = |probs| start_rows::<B>(probs, pass, &exchange(chunk).reversed(), PROBS_BACK);
    Ok((rows, probs.map(start).transpose()?))
}

/// Gradients of the probabilities, `[T, K]`, from those of the rows' weights, `[U, K]`.
pub(super) fn gather_probs<B: FsepKernels>(
    d_weights: FloatTensor<B>,
    rows: &RankRowIndices<B>,
    probs: &FloatTensor<B>,
) -> FloatTensor<B> {
    let (dims, [num_tokens, topk]) = (probs.shape(), probs.shape().dims());
    let (len, row_of) = (num_tokens * topk, &rows.row_of);
    if len == 0 {
        return probs.clone();
    }
    let is_other = B::int_lower_elem(row_of.clone(), 0.into(), bool_dtype::<B>(&row_of.device()));
    let row = B::int_mask_where(row_of.clone(), is_other, B::int_sub_scalar(B::int_neg(row_of.clone()), 1.into()));
    let row = B::int_reshape(B::int_mul_scalar(row, (topk as i64).into()), dims.clone());
    let choice = B::int_expand(B::int_reshape(arange::<B>(topk, row_of), Shape::new([1, topk])), dims.clone());
    let at = B::int_reshape(B::int_add(row, choice), Shape::new([len]));
    let num_weights = d_weights.shape().num_elements();
    let gathered = B::float_select(B::float_reshape(d_weights, Shape::new([num_weights])), 0, at);
    cast::<B>(B::float_reshape(gathered, dims), Some(probs.dtype().into()))
}

/// Gradients of the experts' inputs, `[M, D]`, summed by row, on their way back.
pub(super) fn return_gradients<B: FsepKernels>(
    gradients: FloatTensor<B>,
    routes: &Routes<B>,
    pass: &LayerPass,
    chunk: &ChunkDispatch,
) -> Result<TravellingRows<B>, FsepError> {
    // SAFETY: places are below the number of slot rows, which the gradients have as the tokens had.
    let sums = unsafe { B::fsep_sum_places(&gradients, &routes.places, None, pass.spec.topk) }?;
    drop(gradients);
    start_back::<B>(sums, pass, chunk, GRADIENTS_BACK)
}

/// `[U, D]` of other ranks on their way back to this one.
fn start_back<B: FsepKernels>(
    sums: FloatTensor<B>,
    pass: &LayerPass,
    chunk: &ChunkDispatch,
    name: &'static str,
) -> Result<TravellingRows<B>, FsepError> {
    start_rows::<B>(sums, pass, &exchange(chunk).reversed(), name)
}

/// Rows that come back, summed by token. `[T, D]`
pub(super) fn sum_by_token<B: FsepKernels>(
    returning: TravellingRows<B>,
    rows: &RankRowIndices<B>,
    pass: &LayerPass,
) -> Result<FloatTensor<B>, FsepError> {
    let returned = returning.wait()?;
    // SAFETY: `row_of` names rows of the exchange's plan, by which as many come back as were sent.
    unsafe { B::fsep_sum_places(&returned, &rows.row_of, None, pass.spec.topk) }
}

/// What a kernel was asked for.
pub(super) fn wanted<T>(result: Option<T>, pass: &LayerPass, what: &'static str) -> Result<T, FsepError> {
    result.ok_or_else(|| FsepError::Backend {
        operation: pass.operation(what).to_string(),
        reason: "the kernel returned no rows, which are wanted".into(),
    })
}
