use burn::tensor::{Tensor, TensorData};

/// The load-balancing auxiliary loss `coeff * E * sum_e f_e * P_e` (Switch Transformer, eq. 4), where `f_e` is the
/// share of all ranks' assignments that go to expert `e` and `P_e` the mean probability of `e` over this rank's tokens.
///
/// With equally many tokens on every rank, its mean over ranks is the loss of the whole batch. `scores`: `[T, E]`,
/// `totals`: `[E]`.
pub(super) fn load_balancing_loss(scores: Tensor<2>, totals: &[u64], coeff: f64) -> Tensor<1> {
    let [num_tokens, experts] = scores.dims();
    let all: u64 = totals.iter().sum();
    let factor = coeff * experts as f64 / (all.max(1) as f64 * num_tokens.max(1) as f64);
    let weights: Vec<f32> = totals.iter().map(|&n| (n as f64 * factor) as f32).collect();
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [1, experts]), &scores.device());
    (scores * weights).sum()
}

/// The router z-loss `coeff * mean_t logsumexp(logits_t)^2` (ST-MoE, eq. 5). `logits`: `[T, E]`
pub(super) fn z_loss(logits: Tensor<2>, coeff: f64) -> Tensor<1> {
    let num_tokens = logits.dims()[0].max(1);
    let max = logits.clone().detach().max_dim(1);
    let log_sum = (logits - max.clone()).exp().sum_dim(1).log() + max;
    log_sum.square().sum() * (coeff / num_tokens as f64)
}
