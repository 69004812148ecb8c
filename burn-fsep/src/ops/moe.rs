use std::sync::Arc;

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};

use super::{
    FsepKernels, MoeStep, Tracked,
    extension::start_restore,
    gradients::{PendingGradient, start_reshard},
    kernels::{CombineGradients, ExpertsBackward, ExpertsGradients, RowIndices},
    weights::{finish_forward, start_unshard},
};
use crate::{FsepError, comm::ExchangePlan};

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
    /// Expert outputs by row, `[T * K, D]`, if the router is trained.
    outputs: Option<FloatTensor<B>>,
    /// `[T, K]`
    probs: FloatTensor<B>,
    /// This rank's parameters: shards or resident experts.
    weights: FloatTensor<B>,
    rows: RowIndices<B>,
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
    rows: RowIndices<B>,
    step: Arc<MoeStep>,
    tracked: Tracked,
) -> MoeForward<B> {
    let result = try_forward(hidden, probs, weights, rows, &step, tracked);
    result.unwrap_or_else(|error| step.runtime.fail(error))
}

fn try_forward<B: FsepKernels>(
    hidden: FloatTensor<B>,
    probs: FloatTensor<B>,
    weights: FloatTensor<B>,
    rows: RowIndices<B>,
    step: &MoeStep,
    tracked: Tracked,
) -> Result<MoeForward<B>, FsepError> {
    // Experts do not depend on tokens: their restore starts first, if it was not started behind the layer before.
    let restoring = start_unshard::<B>(&weights, step, step.restores.as_ref().map(|restores| &restores.forward))?;
    let permuted = B::float_select(hidden, 0, rows.token_of.clone());
    let tokens = exchange_rows::<B>(permuted, step, &step.tokens, "tokens to experts in forward")?;
    // Behind the tokens, so that the two do not compete; it travels while the experts compute.
    if let Some(next) = step.restores.as_ref().and_then(|restores| restores.next.as_ref()) {
        start_restore(next, &step.runtime)?;
    }
    let restored = restoring.wait(step)?;
    let span = step.span("experts in forward");
    let experts = B::fsep_experts(&tokens, &restored, &step.slot_rows)?;
    drop(span);
    finish_forward(restored, step);

    let returned = exchange_rows::<B>(experts.output, step, &step.tokens.reversed(), "outputs to tokens in forward")?;
    // SAFETY: `rows` is the permutation that sorted the assignments, and each of them has one row: plans that do not dispatch
    // every assignment once are refused.
    let output = unsafe { B::fsep_combine(&returned, &rows.row_of, &probs) }?;

    let saved = tracked.any().then(|| Saved {
        tokens,
        kept: (!step.recompute).then_some(experts.kept),
        outputs: tracked.probs.then_some(returned),
        probs,
        weights,
        rows,
    });
    Ok(MoeForward { output, saved })
}

pub(super) fn moe_backward<B: FsepKernels>(
    grad: FloatTensor<B>,
    saved: Saved<B>,
    step: &MoeStep,
    tracked: Tracked,
) -> MoeGradients<B> {
    try_backward(grad, saved, step, tracked).unwrap_or_else(|error| step.runtime.fail(error))
}

fn try_backward<B: FsepKernels>(
    grad: FloatTensor<B>,
    saved: Saved<B>,
    step: &MoeStep,
    tracked: Tracked,
) -> Result<MoeGradients<B>, FsepError> {
    let Saved { tokens, kept, outputs, probs, weights, rows } = saved;
    let before = step.runtime.schedule().turn(step);
    let want_rows = tracked.hidden || tracked.weights;
    // SAFETY: as in forward.
    let combined = |grad: &_| unsafe { B::fsep_combine_backward(grad, outputs.as_ref(), &rows, &probs, want_rows) };
    if !want_rows {
        return Ok(MoeGradients { hidden: None, probs: combined(&grad)?.probs, weights: None });
    }

    // The experts were freed after forward, so they are restored again, while gradients travel to them.
    let restoring = start_unshard::<B>(&weights, step, step.restores.as_ref().map(|restores| &restores.backward))?;
    let CombineGradients { rows: d_rows, probs: d_probs } = combined(&grad)?;
    drop((grad, outputs));
    let d_rows = d_rows.ok_or_else(|| FsepError::Device("the backend returned no gradient of the rows".into()))?;
    let d_slots = exchange_rows::<B>(d_rows, step, &step.tokens, "gradients to experts in backward")?;
    if let Some(before) = before {
        start_restore(&before, &step.runtime)?;
    }
    let restored = restoring.wait(step)?;
    let args =
        ExpertsBackward { tokens, kept, grad: d_slots, want_tokens: tracked.hidden, want_weights: tracked.weights };
    let span = step.span("experts in backward");
    let ExpertsGradients { tokens: d_tokens, weights: d_weights } =
        B::fsep_experts_backward(args, &restored, &step.slot_rows)?;
    drop(span);
    drop(restored);

    // Tokens go first: the layers before need them, the shards' gradients only the optimizer.
    let d_hidden = match d_tokens {
        None => None,
        Some(d_tokens) => {
            let returned =
                exchange_rows::<B>(d_tokens, step, &step.tokens.reversed(), "gradients to tokens in backward")?;
            // SAFETY: as in forward.
            Some(unsafe { B::fsep_sum_rows(&returned, &rows.row_of, step.topk) }?)
        }
    };
    // What the layer after has put off had this layer's whole backward pass to travel.
    step.runtime.schedule().catch_up()?;
    let d_weights = d_weights.map(|gradients| start_reshard::<B>(gradients, step)).transpose()?;
    Ok(MoeGradients { hidden: d_hidden, probs: d_probs, weights: d_weights })
}

/// All-to-All-v of whole rows. `[rows sent, D] -> [rows received, D]`
fn exchange_rows<B: FsepKernels>(
    rows: FloatTensor<B>,
    step: &MoeStep,
    plan: &ExchangePlan,
    name: &'static str,
) -> Result<FloatTensor<B>, FsepError> {
    if step.world_size() == 1 && plan.is_identity(0) {
        return Ok(rows);
    }
    let width = rows.shape()[1];
    let operation = step.operation(name);
    let pending = B::fsep_start_exchange(rows, step.runtime.tokens_comm(), operation, &plan.scaled(width))?;
    pending.wait([plan.recv_len, width])
}
