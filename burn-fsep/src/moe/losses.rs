use burn::tensor::{Tensor, TensorData};

use crate::FsepError;

/// Weights of the auxiliary losses; 0 is off.
///
/// Both losses are means over the tokens of all ranks. A rank has its own tokens' part of the sum, divided by the mean number of
/// tokens of a rank: the mean over ranks, which averaged gradients optimise, is then the loss of the whole batch, however its
/// tokens are split. That is, a rank's own mean weighs `N * T_r / T`.
#[derive(Debug, Clone, Copy)]
pub(super) struct AuxiliaryLosses {
    /// Of the load-balancing loss.
    pub balancing: f64,
    /// Of the z-loss.
    pub z: f64,
}

impl AuxiliaryLosses {
    /// The sum of those that are on, `[1]`. `scores` and `logits`: `[T, E]`; `totals`: assignments of each expert on all of
    /// the `ranks` ranks, `[E]`; `topk`: `K`.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if a loss is on and the router does not say what it needs.
    pub fn of(
        &self,
        scores: Option<Tensor<2>>,
        logits: Option<Tensor<2>>,
        totals: &[u64],
        topk: usize,
        ranks: usize,
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
        let tokens = totals.iter().sum::<u64>() as f64 / topk as f64;
        // Without a token all sums are 0, and the divisor only has to be a number.
        let tokens_per_rank = if tokens > 0.0 { tokens / ranks as f64 } else { 1.0 };
        let balancing = scores.map(|scores| load_balancing_loss(scores, totals, self.balancing, tokens_per_rank));
        let z = logits.map(|logits| z_loss(logits, self.z, tokens_per_rank));
        Ok([balancing, z].into_iter().flatten().reduce(|a, b| a + b))
    }
}

/// The load-balancing auxiliary loss `coeff * E * sum_e f_e * P_e` (Switch Transformer, eq. 4), where `f_e` is the share of all
/// assignments that go to expert `e` and `P_e` its mean probability. `scores`: `[T, E]`, `totals`: `[E]`
fn load_balancing_loss(scores: Tensor<2>, totals: &[u64], coeff: f64, tokens_per_rank: f64) -> Tensor<1> {
    let experts = scores.dims()[1];
    let all: u64 = totals.iter().sum();
    let factor = coeff * experts as f64 / (all.max(1) as f64 * tokens_per_rank);
    let weights: Vec<f32> = totals.iter().map(|&n| (n as f64 * factor) as f32).collect();
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [1, experts]), &scores.device());
    (scores * weights).sum()
}

/// The router z-loss `coeff * mean_t logsumexp(logits_t)^2` (ST-MoE, eq. 5). `logits`: `[T, E]`
fn z_loss(logits: Tensor<2>, coeff: f64, tokens_per_rank: f64) -> Tensor<1> {
    let max = logits.clone().detach().max_dim(1);
    let log_sum = (logits - max.clone()).exp().sum_dim(1).log() + max;
    log_sum.square().sum() * (coeff / tokens_per_rank)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{DType, Device};

    use super::{super::RouterOutput, *};

    /// The losses of these logits on one rank, by the router's own choice.
    fn losses(logits: &[f32], experts: usize, topk: usize) -> [f32; 2] {
        let data = TensorData::new(logits.to_vec(), [logits.len() / experts, experts]);
        let logits = Tensor::<2>::from_data(data, &Device::flex());
        let routed = RouterOutput::top_k(logits, topk, DType::F32);
        let mut totals = vec![0u64; experts];
        routed.experts.to_data().iter::<i64>().for_each(|expert| totals[expert as usize] += 1);
        [(1.0, 0.0), (0.0, 1.0)].map(|(balancing, z)| {
            let (losses, routed) = (AuxiliaryLosses { balancing, z }, routed.clone());
            let loss = losses.of(routed.scores, routed.logits, &totals, topk, 1).unwrap();
            loss.expect("a loss is on").into_scalar::<f32>()
        })
    }

    fn assert_near(actual: f32, expected: f32) {
        assert!((actual - expected).abs() <= 2e-6 * expected, "{actual} is not {expected}");
    }

    /// transformers' `load_balancing_loss_func` is `K` times as large (2.0 and 6.4): its shares are per token and sum to `K`.
    #[test]
    fn the_balancing_loss_is_that_of_the_switch_transformer() {
        let [uniform, z] = losses(&[0.0; 4 * 8], 8, 2);
        assert_near(uniform, 1.0);
        assert_near(z, 4.324077);
        // All tokens go to experts 0 and 1, with 0.4 each.
        let token: Vec<f32> = [0.4f32, 0.4].into_iter().chain([0.2 / 6.0; 6]).map(f32::ln).collect();
        assert_near(losses(&token.repeat(5), 8, 2)[0], 3.2);
    }

    /// Two layers that send all tokens to one expert each, with 0.7: pooled over layers, as in transformers, it would be 1.6.
    #[test]
    fn the_balancing_loss_is_that_of_a_layer() {
        for expert in [0, 1] {
            let token: Vec<f32> = (0..4).map(|e| if e == expert { 0.7f32.ln() } else { 0.1f32.ln() }).collect();
            assert_near(losses(&token.repeat(3), 4, 1)[0], 2.8);
        }
    }

    #[test]
    fn no_loss_without_a_coefficient_and_none_but_zero_without_a_token() {
        let none = || Some(Tensor::<2>::zeros([0, 4], &Device::flex()));
        let loss = |balancing, z| AuxiliaryLosses { balancing, z }.of(none(), none(), &[0; 4], 2, 2).unwrap();
        assert!(loss(0.0, 0.0).is_none());
        assert_eq!(loss(1.0, 1.0).unwrap().into_scalar::<f32>(), 0.0);
    }

    #[test]
    fn a_loss_that_the_router_says_nothing_for_is_refused() {
        for (balancing, z, named) in [(1.0, 0.0, "moe_aux_loss_coeff"), (0.0, 1.0, "moe_z_loss_coeff")] {
            let error = AuxiliaryLosses { balancing, z }.of(None, None, &[4], 1, 1).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
