use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};

use super::{
    FsepKernels, LayerPass, Tracked,
    expert_weights::{end_forward, start_unshard},
    gradients::{PendingGradient, start_reshard},
    tensor_exchange::PendingTensor,
    types::{CombineGradients, ExpertsBackward, ExpertsGradients, RowIndices},
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
    rows: RowIndices<B>,
    pass: &LayerPass,
    tracked: Tracked,
) -> Result<MoeForward<B>, FsepError> {
    // Experts do not depend on tokens: their unshard starts first, if it was not started behind the layer before.
    let unshards = pass.unshards.as_ref();
    let unsharding = start_unshard::<B>(&weights, pass, unshards.map(|unshards| &unshards.forward))?;
    // SAFETY: `token_of` has each assignment's number divided by K, so its indices are below T, the number of rows.
    let permuted = unsafe { B::fsep_select_rows(hidden, &rows.token_of) }?;
    let travelling = start_rows::<B>(permuted, pass, &pass.dispatch.tokens, "tokens to experts in forward")?;
    pass.work_beside_tokens();
    let tokens = travelling.wait()?;
    // Behind the tokens, so that the two do not compete; it travels while the experts compute.
    if let Some(next) = unshards.and_then(|unshards| unshards.next.as_ref()) {
        next.start()?;
    }
    let unsharded = unsharding.wait(pass)?;
    let span = pass.span("experts in forward");
    let experts = B::fsep_experts(&tokens, &unsharded, pass.spec.activation, &pass.dispatch.slot_rows)?;
    drop(span);
    end_forward(unsharded, pass)?;

    let returned =
        exchange_rows::<B>(experts.output, pass, &pass.dispatch.tokens.reversed(), "outputs to tokens in forward")?;
    // SAFETY: `row_of` is the permutation that sorted this rank's T * K assignments, so its indices are below T * K, and
    // `returned` has that many rows: each exchange refuses a tensor that has not the elements that its plan sends, so the
    // plan sends the T * K permuted rows, and the reversed plan receives as many as the plan sends.
    let output = unsafe { B::fsep_combine(&returned, &rows.row_of, &probs) }?;

    let saved = tracked.any().then(|| Saved {
        tokens,
        kept: (!pass.spec.recompute).then_some(experts.kept),
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
    let Saved { tokens, kept, outputs, probs, weights, rows } = saved;
    let before = pass.host.begin_backward(pass);
    let want_rows = tracked.hidden || tracked.weights;
    // SAFETY: as in forward.
    let combined = |grad: &_| unsafe { B::fsep_combine_backward(grad, outputs.as_ref(), &rows, &probs, want_rows) };
    if !want_rows {
        return Ok(MoeGradients { hidden: None, probs: combined(&grad)?.probs, weights: None });
    }

    // The experts were freed after forward, so they are unsharded again, while gradients travel to them.
    let unshard = pass.unshards.as_ref().map(|unshards| &unshards.backward);
    let unsharding = start_unshard::<B>(&weights, pass, unshard)?;
    let CombineGradients { rows: d_rows, probs: d_probs } = combined(&grad)?;
    drop((grad, outputs));
    let d_rows = d_rows.ok_or_else(|| FsepError::Backend {
        operation: pass.operation("combine in backward").to_string(),
        reason: "the kernel returned no gradient of the rows, which is wanted".into(),
    })?;
    let d_slots = exchange_rows::<B>(d_rows, pass, &pass.dispatch.tokens, "gradients to experts in backward")?;
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
    let d_hidden = match d_tokens {
        None => None,
        Some(d_tokens) => {
            let returned = exchange_rows::<B>(
                d_tokens,
                pass,
                &pass.dispatch.tokens.reversed(),
                "gradients to tokens in backward",
            )?;
            // SAFETY: as in forward.
            Some(unsafe { B::fsep_sum_rows(&returned, &rows.row_of, pass.spec.topk) }?)
        }
    };
    // What the layer after has put off had this layer's whole backward pass to travel.
    pass.host.catch_up()?;
    let d_weights = d_weights.map(|gradients| start_reshard::<B>(gradients, pass)).transpose()?;
    Ok(MoeGradients { hidden: d_hidden, probs: d_probs, weights: d_weights })
}

/// Rows on their way to other ranks.
enum TravellingRows<B: Backend> {
    /// They stay where they are.
    Here(FloatTensor<B>),
    Travelling(PendingTensor<B>, [usize; 2]),
}

impl<B: FsepKernels> TravellingRows<B> {
    /// `[rows received, D]`
    fn wait(self) -> Result<FloatTensor<B>, FsepError> {
        match self {
            Self::Here(rows) => Ok(rows),
            Self::Travelling(pending, dims) => pending.wait(dims),
        }
    }
}

/// Starts an All-to-All-v of whole rows. `[rows sent, D] -> [rows received, D]`
fn start_rows<B: FsepKernels>(
    rows: FloatTensor<B>,
    pass: &LayerPass,
    plan: &ExchangePlan,
    name: &'static str,
) -> Result<TravellingRows<B>, FsepError> {
    if pass.spec.world_size == 1 && rows.shape()[0] == plan.send_len && plan.is_identity(0) {
        return Ok(TravellingRows::Here(rows));
    }
    let width = rows.shape()[1];
    let operation = pass.operation(name);
    let pending = B::fsep_start_exchange(rows, pass.context.tokens.as_ref(), operation, &plan.scaled(width))?;
    Ok(TravellingRows::Travelling(pending, [plan.recv_len, width]))
}

/// All-to-All-v of whole rows. `[rows sent, D] -> [rows received, D]`
fn exchange_rows<B: FsepKernels>(
    rows: FloatTensor<B>,
    pass: &LayerPass,
    plan: &ExchangePlan,
    name: &'static str,
) -> Result<FloatTensor<B>, FsepError> {
    start_rows::<B>(rows, pass, plan, name)?.wait()
}
