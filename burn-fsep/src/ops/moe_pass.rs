use burn::backend::{Backend, tensor::FloatTensor};

use super::{
    FsepKernels, LayerPass, Tracked,
    expert_weights::{end_forward, start_unshard},
    gradients::{PendingGradient, start_reshard},
    pass_rows::{PassRows, SavedRows, wanted_rows},
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
    /// Received tokens by slot, `[M, D]`.
    tokens: FloatTensor<B>,
    /// What the experts kept, unless it is to be computed again.
    kept: Option<Vec<FloatTensor<B>>>,
    /// This rank's parameters: shards or resident experts.
    weights: FloatTensor<B>,
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
    rows: PassRows<B>,
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
    rows: PassRows<B>,
    pass: &LayerPass,
    tracked: Tracked,
) -> Result<MoeForward<B>, FsepError> {
    // Experts do not depend on tokens: their unshard starts first, if it was not started behind the layer before.
    let unshards = pass.unshards.as_ref();
    let unsharding = start_unshard::<B>(&weights, pass, unshards.map(|unshards| &unshards.forward))?;
    let travelling = rows.start_tokens(hidden, &probs, pass)?;
    pass.work_beside_tokens();
    let (tokens, mut rows) = rows.wait_for_tokens(travelling, probs, pass)?;
    // Behind the tokens, so that the two do not compete; it travels while the experts compute.
    if let Some(next) = unshards.and_then(|unshards| unshards.next.as_ref()) {
        next.start()?;
    }
    let unsharded = unsharding.wait(pass)?;
    let span = pass.span("experts in forward");
    let experts = B::fsep_experts(&tokens, &unsharded, pass.spec.activation, &pass.dispatch.slot_rows)?;
    drop(span);
    end_forward(unsharded, pass)?;

    let output = rows.combine(experts.output, pass, tracked.probs)?;
    let saved =
        tracked.any().then(|| Saved { tokens, kept: (!pass.spec.recompute).then_some(experts.kept), weights, rows });
    Ok(MoeForward { output, saved })
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
    let Saved { tokens, kept, weights, mut rows } = saved;
    let before = pass.host.begin_backward(pass);
    let want_rows = tracked.hidden || tracked.weights;
    if !want_rows {
        let travelling = rows.start_gradients(grad, pass, want_rows)?;
        let (_, d_probs) = rows.wait_for_gradients(travelling, pass, want_rows)?;
        return Ok(MoeGradients { hidden: None, probs: rows.wait_for_probs(d_probs)?, weights: None });
    }

    // The experts were freed after forward, so they are unsharded again, while gradients travel to them.
    let unshard = pass.unshards.as_ref().map(|unshards| &unshards.backward);
    let unsharding = start_unshard::<B>(&weights, pass, unshard)?;
    let travelling = rows.start_gradients(grad, pass, want_rows)?;
    let (d_slots, d_probs) = rows.wait_for_gradients(travelling, pass, want_rows)?;
    let d_slots = wanted_rows(d_slots, pass)?;
    if let Some(before) = before {
        before.start()?;
    }
    let unsharded = unsharding.wait(pass)?;
    let args =
        ExpertsBackward { tokens, kept, grad: d_slots, want_tokens: tracked.hidden, want_weights: tracked.weights };
    let span = pass.span("experts in backward");
    let ExpertsGradients { tokens: d_tokens, weights: d_weights } =
        B::fsep_experts_backward(args, &unsharded, pass.spec.activation, &pass.dispatch.slot_rows)?;
    drop(span);
    drop(unsharded);

    // Tokens go first: the layers before need them, the shards' gradients only the optimizer.
    let d_hidden = d_tokens.map(|d_tokens| rows.sum_gradients(d_tokens, pass)).transpose()?;
    let d_probs = rows.wait_for_probs(d_probs)?;
    // What the layer after has put off had this layer's whole backward pass to travel.
    pass.host.catch_up()?;
    let d_weights = d_weights.map(|gradients| start_reshard::<B>(gradients, pass)).transpose()?;
    Ok(MoeGradients { hidden: d_hidden, probs: d_probs, weights: d_weights })
}
