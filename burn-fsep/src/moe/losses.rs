use burn::tensor::{Tensor, TensorData};

use crate::FsepError;

/// The auxiliary losses of a layer, which need the counts of all ranks.
#[derive(Debug, Clone, Copy)]
pub(super) struct AuxiliaryLosses {
    /// Weight of the load-balancing loss; 0 is off.
    pub balancing: f64,
    /// Weight of the z-loss; 0 is off.
    pub z: f64,
}

impl AuxiliaryLosses {
    /// The sum of those that are on, `[1]`. `scores` and `logits`: `[T, E]`, `totals`: `[E]`.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if a loss is on and the router does not say what it needs.
    pub fn of(
        &self,
        scores: Option<Tensor<2>>,
        logits: Option<Tensor<2>>,
        totals: &[u64],
    ) -> Result<Option<Tensor<1>>, FsepError> {
        let needed = |coeff: f64, tensor: Option<Tensor<2>>, option: &str, what: &str| {
            if coeff == 0.0 {
                return Ok(None);
            }
            let missing = || FsepError::Config(format!("{option} is {coeff}, but the router's output has no {what}"));
            tensor.ok_or_else(missing).map(Some)
        };
        let scores = needed(self.balancing, scores, "moe_aux_loss_coeff", "scores")?;
        let logits = needed(self.z, logits, "moe_z_loss_coeff", "logits")?;
        let balancing = scores.map(|scores| load_balancing_loss(scores, totals, self.balancing));
        let z = logits.map(|logits| z_loss(logits, self.z));
        Ok([balancing, z].into_iter().flatten().reduce(|a, b| a + b))
    }
}

/// The load-balancing auxiliary loss `coeff * E * sum_e f_e * P_e` (Switch Transformer, eq. 4), where `f_e` is the
/// share of all ranks' assignments that go to expert `e` and `P_e` the mean probability of `e` over this rank's tokens.
///
/// With equally many tokens on every rank, its mean over ranks is the loss of the whole batch. `scores`: `[T, E]`,
/// `totals`: `[E]`.
fn load_balancing_loss(scores: Tensor<2>, totals: &[u64], coeff: f64) -> Tensor<1> {
    let [num_tokens, experts] = scores.dims();
    let all: u64 = totals.iter().sum();
    let factor = coeff * experts as f64 / (all.max(1) as f64 * num_tokens.max(1) as f64);
    let weights: Vec<f32> = totals.iter().map(|&n| (n as f64 * factor) as f32).collect();
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [1, experts]), &scores.device());
    (scores * weights).sum()
}

/// The router z-loss `coeff * mean_t logsumexp(logits_t)^2` (ST-MoE, eq. 5). `logits`: `[T, E]`
fn z_loss(logits: Tensor<2>, coeff: f64) -> Tensor<1> {
    let num_tokens = logits.dims()[0].max(1);
    let max = logits.clone().detach().max_dim(1);
    let log_sum = (logits - max.clone()).exp().sum_dim(1).log() + max;
    log_sum.square().sum() * (coeff / num_tokens as f64)
}
