use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{Shape, Slice},
};

use super::{
    ChunkDispatch, FsepKernels, LayerPass, Tracked,
    by_rank::wanted,
    expert_weights::{end_backward, end_forward, start_unshard},
    gradients::{PendingGradient, start_reshard},
    pass_rows::{PassRows, SavedRows},
    types::{ExpertsBackward, ExpertsGradients},
};
use crate::FsepError;

/// Result of the forward pass.
pub(super) struct MoeForward<B: Backend> {
    /// `[T, D]`
    pub output: FloatTensor<B>,
    /// What backward needs, if it will run.
    pub saved: Option<Saved<B>>,
}

/// What backward needs: tokens, never weights.
#[derive(Debug, Clone)]
pub(super) struct Saved<B: Backend> {
    /// This rank's parameters: shards or resident experts.
    weights: FloatTensor<B>,
    chunks: Vec<SavedChunk<B>>,
}

/// What backward needs of a chunk.
#[derive(Debug, Clone)]
struct SavedChunk<B: Backend> {
    /// Received tokens by slot, `[M, D]`.
    tokens: FloatTensor<B>,
    /// What the experts kept, unless it is to be computed again.
    kept: Option<Vec<FloatTensor<B>>>,
    rows: SavedRows<B>,
}

/// Gradients of the layer's inputs; `None` where none is wanted.
pub(super) struct MoeGradients<B: Backend> {
    /// `[T, D]`
    pub hidden: Option<FloatTensor<B>>,
    /// `[T, K]`
    pub probs: Option<FloatTensor<B>>,
    /// As the parameters, on its way.
    pub weights: Option<PendingGradient<B>>,
}

pub(super) fn moe_forward<B: FsepKernels>(
    hidden: FloatTensor<B>,
    probs: FloatTensor<B>,
    weights: FloatTensor<B>,
    rows: Vec<PassRows<B>>,
    pass: &LayerPass,
    tracked: Tracked,
) -> MoeForward<B> {
    let result = try_forward(hidden, probs, weights, rows, pass, tracked);
    result.unwrap_or_else(|error| pass.host.fail(error))
}

fn try_forward<B: FsepKernels>(
    hidden: FloatTensor<B>,
    probs: FloatTensor<B>,
    weights: FloatTensor<B>,
    rows: Vec<PassRows<B>>,
    pass: &LayerPass,
    tracked: Tracked,
) -> Result<MoeForward<B>, FsepError> {
    // Experts do not depend on tokens: their unshard starts first, if it was not started behind the layer before.
    let unshards = pass.unshards.as_ref();
    let mut unsharding = Some(start_unshard::<B>(&weights, pass, unshards.map(|unshards| &unshards.forward))?);
    let start = |(rows, chunk): (PassRows<B>, _)| {
        let probs = tokens_of::<B>(&probs, chunk);
        let travelling = rows.start_tokens(tokens_of::<B>(&hidden, chunk), &probs, pass, chunk)?;
        Ok((rows, travelling, probs, chunk))
    };
    let travelling: Result<Vec<_>, FsepError> = rows.into_iter().zip(&pass.dispatch.chunks).map(start).collect();
    let travelling = travelling?;
    pass.work_beside_tokens();

    let (mut unsharded, mut computed) = (None, Vec::with_capacity(travelling.len()));
    for (rows, travelling, probs, chunk) in travelling {
        let (tokens, mut rows) = rows.wait_for_tokens(travelling, probs, pass, chunk)?;
        if let Some(unsharding) = unsharding.take() {
            // Behind the tokens, so that the two do not compete; it travels while the experts compute.
            if let Some(next) = unshards.and_then(|unshards| unshards.next.as_ref()) {
                next.start()?;
            }
            unsharded = Some(unsharding.wait(pass)?);
        }
        let unsharded = unsharded.as_ref().expect("the first chunk has waited for them");
        let span = pass.span("experts in forward");
        let experts = B::fsep_experts(&tokens, unsharded, pass.spec.activation, &chunk.slot_rows)?;
        drop(span);
        // They travel while the next chunk is computed.
        let returning = rows.return_outputs(experts.output, pass, chunk, tracked.probs)?;
        let kept = (!pass.spec.recompute).then_some(experts.kept);
        computed.push((returning, SavedChunk { tokens, kept, rows }));
    }
    end_forward(unsharded.expect("there is a chunk"), pass)?;

    let (mut outputs, mut chunks) = (Vec::with_capacity(computed.len()), Vec::with_capacity(computed.len()));
    for (returning, mut chunk) in computed {
        outputs.push(chunk.rows.combine(returning, pass, tracked.probs)?);
        chunks.push(chunk);
    }
    let saved = tracked.any().then_some(Saved { weights, chunks });
    Ok(MoeForward { output: cat_chunks::<B>(outputs), saved })
}

pub(super) fn moe_backward<B: FsepKernels>(
    grad: FloatTensor<B>,
    saved: Saved<B>,
    pass: &LayerPass,
    tracked: Tracked,
) -> MoeGradients<B> {
    try_backward(grad, saved, pass, tracked).unwrap_or_else(|error| pass.host.fail(error))
}

fn try_backward<B: FsepKernels>(
    grad: FloatTensor<B>,
    saved: Saved<B>,
    pass: &LayerPass,
    tracked: Tracked,
) -> Result<MoeGradients<B>, FsepError> {
    let Saved { weights, chunks } = saved;
    let mut before = pass.host.begin_backward(pass);
    let want_rows = tracked.hidden || tracked.weights;
    // The experts were freed after forward, so they are unsharded again, while gradients travel to them.
    let unshard = pass.unshards.as_ref().map(|unshards| &unshards.backward);
    let mut unsharding = want_rows.then(|| start_unshard::<B>(&weights, pass, unshard)).transpose()?;
    let start = |(mut saved, chunk): (SavedChunk<B>, _)| {
        let travelling = saved.rows.start_gradients(tokens_of::<B>(&grad, chunk), pass, chunk, want_rows)?;
        Ok((saved, travelling, chunk))
    };
    let travelling: Result<Vec<_>, FsepError> = chunks.into_iter().zip(&pass.dispatch.chunks).map(start).collect();
    let travelling = travelling?;
    drop(grad);

    let (mut unsharded, mut d_weights, mut returning) = (None, None, Vec::with_capacity(travelling.len()));
    for (saved, travelling, chunk) in travelling {
        let SavedChunk { tokens, kept, mut rows } = saved;
        let (d_slots, d_probs) = rows.wait_for_gradients(travelling, pass, chunk, want_rows)?;
        if !want_rows {
            returning.push((rows, None, d_probs));
            continue;
        }
        let d_slots = wanted(d_slots, pass, "combine in backward")?;
        if let Some(before) = before.take() {
            before.start()?;
        }
        if let Some(unsharding) = unsharding.take() {
            unsharded = Some(unsharding.wait(pass)?);
        }
        let unsharded = unsharded.as_ref().expect("the first chunk has waited for them");
        let args =
            ExpertsBackward { tokens, kept, grad: d_slots, want_tokens: tracked.hidden, want_weights: tracked.weights };
        let span = pass.span("experts in backward");
        let ExpertsGradients { tokens: d_tokens, weights: unfinished } =
            B::fsep_experts_backward(args, unsharded, pass.spec.activation, &chunk.slot_rows)?;
        // Tokens go first: the layers before need them, the shards' gradients only the optimizer. They travel while the rest of
        // these is computed, and the next chunk.
        let d_tokens = d_tokens.map(|d_tokens| rows.return_gradients(d_tokens, pass, chunk)).transpose()?;
        if let Some(unfinished) = unfinished {
            let gradients = B::fsep_finish_gradients(unfinished, unsharded, &chunk.slot_rows)?;
            d_weights = Some(match d_weights {
                None => gradients,
                Some(sum) => B::float_add(sum, gradients),
            });
        }
        drop(span);
        returning.push((rows, d_tokens, d_probs));
    }
    if let Some(unsharded) = unsharded {
        end_backward(unsharded, pass)?;
    }

    let (mut d_hidden, mut d_probs) = (Vec::with_capacity(returning.len()), Vec::with_capacity(returning.len()));
    for (rows, d_tokens, probs) in returning {
        d_hidden.extend(d_tokens.map(|d_tokens| rows.sum_gradients(d_tokens, pass)).transpose()?);
        d_probs.extend(rows.wait_for_probs(probs)?);
    }
    // What the layer after has put off had this layer's whole backward pass to travel.
    if want_rows {
        pass.host.catch_up()?;
    }
    let d_weights = d_weights.map(|gradients| start_reshard::<B>(gradients, pass)).transpose()?;
    let all = |chunks: Vec<_>| (!chunks.is_empty()).then(|| cat_chunks::<B>(chunks));
    Ok(MoeGradients { hidden: all(d_hidden), probs: all(d_probs), weights: d_weights })
}

/// A chunk's rows of a tensor of all tokens.
fn tokens_of<B: Backend>(all: &FloatTensor<B>, chunk: &ChunkDispatch) -> FloatTensor<B> {
    if all.shape()[0] == chunk.range.len() {
        return all.clone();
    }
    let width = all.shape()[1];
    if chunk.range.is_empty() {
        return B::float_zeros(Shape::new([0, width]), &all.device(), all.dtype().into());
    }
    B::float_slice(all.clone(), &[Slice::from(chunk.range.clone()), Slice::from(0..width)])
}

/// The rows of all chunks, of which there is one at least. Backends concatenate no empty parts.
fn cat_chunks<B: Backend>(mut chunks: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    let has_rows = |chunk: &FloatTensor<B>| chunk.shape()[0] > 0;
    if chunks.iter().any(has_rows) {
        chunks.retain(has_rows);
    } else {
        chunks.truncate(1);
    }
    match chunks.len() {
        1 => chunks.swap_remove(0),
        _ => B::float_cat(chunks, 0),
    }
}
