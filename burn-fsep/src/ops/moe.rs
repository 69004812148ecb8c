use std::sync::Arc;

use burn::{
    backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::Shape,
};

use super::{
    FsepKernels, MoeStep, Tracked,
    host::start_exchange,
    kernels::{ExpertsBackward, ExpertsGradients},
    weights::{start_reshard, start_unshard},
};
use crate::{FsepError, comm::ExchangePlan};

/// Index tensors between assignments (`t * K + k`) and rows (assignments sorted by expert). Shape `[T * K]` each.
#[derive(Debug, Clone)]
pub(super) struct RowIndices<B: Backend> {
    pub row_of: IntTensor<B>,
    pub assignment_of: IntTensor<B>,
    pub token_of: IntTensor<B>,
}

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
    /// Expert outputs by assignment, `[T, K, D]`, if the router is trained.
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
    /// As the parameters.
    pub weights: Option<FloatTensor<B>>,
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
    let [num_tokens, width] = hidden.shape().dims();

    // Weights do not depend on tokens: they start first and travel while tokens are permuted and sent.
    let restoring = start_unshard::<B>(weights.clone(), step, "restore for forward")?;
    let permuted = B::float_select(hidden, 0, rows.token_of.clone());
    let tokens = exchange_rows::<B>(permuted, step, &step.tokens, "tokens to experts in forward")?;
    let restored = restoring.wait(step)?;
    let experts = B::fsep_experts(&tokens, &restored, &step.slot_rows)?;
    drop(restored);

    let returned = exchange_rows::<B>(experts.output, step, &step.tokens.reversed(), "outputs to tokens in forward")?;
    let outputs = B::float_select(returned, 0, rows.row_of.clone());
    let outputs = B::float_reshape(outputs, Shape::new([num_tokens, step.topk, width]));
    let output = weighted_sum::<B>(outputs.clone(), probs.clone());

    let saved = tracked.any().then(|| Saved {
        tokens,
        kept: (!step.recompute).then_some(experts.kept),
        outputs: tracked.probs.then_some(outputs),
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
    let [num_tokens, width] = grad.shape().dims();
    let Saved { tokens, kept, outputs, probs, weights, rows } = saved;
    let by_assignment = |tensor: FloatTensor<B>| B::float_reshape(tensor, Shape::new([num_tokens, step.topk, width]));
    let grad = B::float_reshape(grad, Shape::new([num_tokens, 1, width]));

    let d_probs = outputs.map(|outputs| {
        let products = B::float_mul(outputs, grad.clone());
        B::float_reshape(B::float_sum_dim(products, 2), Shape::new([num_tokens, step.topk]))
    });
    if !tracked.hidden && !tracked.weights {
        return Ok(MoeGradients { hidden: None, probs: d_probs, weights: None });
    }

    // The weights were freed after forward, so they are restored again, while gradients travel to the experts.
    let restoring = start_unshard::<B>(weights, step, "restore for backward")?;
    let d_outputs = B::float_mul(grad, B::float_reshape(probs, Shape::new([num_tokens, step.topk, 1])));
    let d_outputs = B::float_reshape(d_outputs, Shape::new([num_tokens * step.topk, width]));
    let d_rows = B::float_select(d_outputs, 0, rows.assignment_of);
    let d_slots = exchange_rows::<B>(d_rows, step, &step.tokens, "gradients to experts in backward")?;
    let restored = restoring.wait(step)?;
    let args =
        ExpertsBackward { tokens, kept, grad: d_slots, want_tokens: tracked.hidden, want_weights: tracked.weights };
    let ExpertsGradients { tokens: d_tokens, weights: d_weights } =
        B::fsep_experts_backward(args, &restored, &step.slot_rows)?;
    drop(restored);

    // Tokens are waited for first: the layers before need them, the shards' gradients only the optimizer.
    let resharding = d_weights.map(|gradients| start_reshard::<B>(gradients, step)).transpose()?;
    let d_hidden = match d_tokens {
        None => None,
        Some(d_tokens) => {
            let returned =
                exchange_rows::<B>(d_tokens, step, &step.tokens.reversed(), "gradients to tokens in backward")?;
            let by_token = by_assignment(B::float_select(returned, 0, rows.row_of));
            Some(B::float_reshape(B::float_sum_dim(by_token, 1), Shape::new([num_tokens, width])))
        }
    };
    let d_weights = resharding.map(|pending| pending.wait(step)).transpose()?;
    Ok(MoeGradients { hidden: d_hidden, probs: d_probs, weights: d_weights })
}

/// Sums the experts' outputs of each token, weighted. `([T, K, D], [T, K]) -> [T, D]`
fn weighted_sum<B: Backend>(outputs: FloatTensor<B>, probs: FloatTensor<B>) -> FloatTensor<B> {
    let [num_tokens, topk, width] = outputs.shape().dims();
    let weighted = B::float_mul(outputs, B::float_reshape(probs, Shape::new([num_tokens, topk, 1])));
    B::float_reshape(B::float_sum_dim(weighted, 1), Shape::new([num_tokens, width]))
}

/// All-to-All-v of whole rows. `[rows sent, D] -> [rows received, D]`
fn exchange_rows<B: Backend>(
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
    let pending = start_exchange::<B>(rows, step.runtime.tokens_comm(), operation, &plan.scaled(width))?;
    pending.wait([plan.recv_len, width])
}
