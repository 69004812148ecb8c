use burn::tensor::{Tensor, TensorData};

use super::RouterOutput;

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
    /// Sum of the losses that are switched on and that the router gives what they need for. `[1]`
    ///
    /// `totals`: assignments of each expert on all of the `ranks` ranks, `[E]`.
    pub fn of(&self, routed: &RouterOutput, totals: &[u64], ranks: usize) -> Option<Tensor<1>> {
        let topk = routed.experts.dims()[1];
        let tokens = totals.iter().sum::<u64>() as f64 / topk as f64;
        // Without a token all sums are 0, and the divisor only has to be a number.
        let tokens_per_rank = if tokens > 0.0 { tokens / ranks as f64 } else { 1.0 };
        let scores = routed.scores.clone().filter(|_| self.balancing > 0.0);
        let balancing = scores.map(|scores| load_balancing_loss(scores, totals, self.balancing, tokens_per_rank));
        let logits = routed.logits.clone().filter(|_| self.z > 0.0);
        let z = logits.map(|logits| z_loss(logits, self.z, tokens_per_rank));
        [balancing, z].into_iter().flatten().reduce(|a, b| a + b)
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

    use super::*;

    /// The losses of these logits on one rank, by the router's own choice.
    fn losses(logits: &[f32], experts: usize, topk: usize) -> [f32; 2] {
        let data = TensorData::new(logits.to_vec(), [logits.len() / experts, experts]);
        let logits = Tensor::<2>::from_data(data, &Device::flex());
        let routed = RouterOutput::top_k(logits, topk, DType::F32);
        let mut totals = vec![0u64; experts];
        routed.experts.to_data().iter::<i64>().for_each(|expert| totals[expert as usize] += 1);
        [(1.0, 0.0), (0.0, 1.0)].map(|(balancing, z)| {
            AuxiliaryLosses { balancing, z }.of(&routed, &totals, 1).unwrap().into_scalar::<f32>()
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
        let routed = RouterOutput::top_k(Tensor::zeros([0, 4], &Device::flex()), 2, DType::F32);
        assert!(AuxiliaryLosses { balancing: 0.0, z: 0.0 }.of(&routed, &[0; 4], 2).is_none());
        let loss = AuxiliaryLosses { balancing: 1.0, z: 1.0 }.of(&routed, &[0; 4], 2).unwrap();
        assert_eq!(loss.into_scalar::<f32>(), 0.0);
    }
}
