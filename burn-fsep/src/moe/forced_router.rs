use std::sync::Arc;

use burn::{
    config::Config,
    tensor::{Device, Int, Tensor, TensorData},
};
use parking_lot::Mutex;

use super::{RouterOutput, TopKRouter};
use crate::{
    FsepError,
    shard::{mix, uniform},
};

/// Routing that does not come from the router, for throughput tests.
#[derive(Config, Debug, PartialEq)]
pub enum RouterForcing {
    /// All experts get equally many tokens.
    LoadBalancing,
    /// Fixed random biases with this standard deviation are added to the router's logits.
    Biased(f64),
    /// Experts get exactly these shares of the assignments: sum 1, none above `1 / K`. Shape `[E]`.
    Shares(Vec<f64>),
}

/// A router for throughput tests: it takes the weight of a [`TopKRouter`], but decides itself where tokens go. The router's
/// probabilities of the forced experts are their weights, so that it gets gradients as ever.
#[derive(Debug, Clone)]
pub(super) enum ForcedRouter {
    /// Added to the logits. Shape `[E]`.
    Bias(Vec<f32>),
    Shares {
        /// Shape `[E]`.
        shares: Vec<f64>,
        /// The choices of the most tokens so far, on their device: those of fewer tokens are its first rows. `[T, K]`
        chosen: Arc<Mutex<Option<Tensor<2, Int>>>>,
    },
}

impl RouterForcing {
    /// Whether `num_experts` experts, of which each token gets `topk`, can be forced so.
    pub(super) fn check(&self, num_experts: usize, topk: usize) -> Result<(), FsepError> {
        let largest = 1.0 / topk as f64 + 1e-9;
        match self {
            Self::Biased(std) if !std.is_finite() || *std < 0.0 => Err(FsepError::Config(format!(
                "moe_router_force: the deviation of biases must be finite and not negative, got {std}"
            ))),
            Self::Shares(shares)
                if shares.len() != num_experts
                    || (shares.iter().sum::<f64>() - 1.0).abs() > 1e-6
                    || shares.iter().any(|share| !(0.0..=largest).contains(share)) =>
            {
                Err(FsepError::Config(format!(
                    "moe_router_force needs {num_experts} shares between 0 and 1 / moe_router_topk that sum to 1, got {shares:?}"
                )))
            }
            _ => Ok(()),
        }
    }
}

impl ForcedRouter {
    /// `forcing` has to be possible. Biases depend on `seed` and the number of the layer.
    pub fn new(forcing: &RouterForcing, num_experts: usize, seed: u64, layer: usize) -> Self {
        let by_shares = |shares| Self::Shares { shares, chosen: Arc::default() };
        match forcing {
            RouterForcing::LoadBalancing => by_shares(vec![1.0 / num_experts as f64; num_experts]),
            RouterForcing::Biased(std) => Self::Bias(biases(*std, num_experts, seed, layer)),
            RouterForcing::Shares(shares) => by_shares(shares.clone()),
        }
    }

    /// Routes tokens by `forced` if there is one, else by the layer's own router. `[T, D] -> RouterOutput`
    ///
    /// # Errors
    ///
    /// As [`TopKRouter::forward`].
    pub fn or(forced: Option<&Self>, router: &TopKRouter, hidden: Tensor<2>) -> Result<RouterOutput, FsepError> {
        let Some(forced) = forced else { return router.forward(hidden) };
        let (tokens, dtype, topk) = (hidden.dims()[0], hidden.dtype(), router.topk());
        let logits = router.logits(hidden)?;
        Ok(match forced {
            Self::Bias(bias) => {
                let bias = TensorData::new(bias.clone(), [1, bias.len()]);
                let bias = Tensor::<2>::from_data(bias, &logits.device());
                router.choose(logits + bias, dtype)
            }
            Self::Shares { shares, chosen } => {
                let chosen = choose_once(&mut chosen.lock(), shares, tokens, topk, &logits.device().inner());
                router.weigh(logits, chosen, dtype)
            }
        })
    }
}

/// The choices of `tokens` tokens, computed where `chosen` has fewer, or has them on another device. `[T, K]`
fn choose_once(
    chosen: &mut Option<Tensor<2, Int>>,
    shares: &[f64],
    tokens: usize,
    topk: usize,
    device: &Device,
) -> Tensor<2, Int> {
    let all = match chosen {
        Some(all) if all.dims()[0] >= tokens && all.device() == *device => all,
        _ => {
            let data = TensorData::new(choose_by_shares(shares, tokens, topk), [tokens, topk]);
            chosen.insert(Tensor::from_data(data, device))
        }
    };
    if all.dims()[0] == tokens { all.clone() } else { all.clone().slice([0..tokens, 0..topk]) }
}

/// Experts of each token such that after any number of tokens the shares are as exact as whole numbers allow.
/// `[E] -> [T * K]`
fn choose_by_shares(shares: &[f64], num_tokens: usize, topk: usize) -> Vec<i32> {
    let mut owed = vec![0.0f64; shares.len()];
    let mut order: Vec<i32> = (0..shares.len() as i32).collect();
    let mut chosen = Vec::with_capacity(num_tokens * topk);
    for _ in 0..num_tokens {
        for (owed, share) in owed.iter_mut().zip(shares) {
            *owed += share * topk as f64;
        }
        // Rounded, so that ties are ties whatever the rounding errors of the sums.
        order.select_nth_unstable_by_key(topk - 1, |&e| (-(owed[e as usize] * 1e6f64).round() as i64, e));
        for &expert in &order[..topk] {
            owed[expert as usize] -= 1.0;
            chosen.push(expert);
        }
    }
    chosen
}

/// Nearly normal numbers that are the same on every platform: each is the sum of twelve uniform ones, whose variance is 4.
/// Shape `[E]`.
fn biases(std: f64, num_experts: usize, seed: u64, layer: usize) -> Vec<f32> {
    let stream = mix(mix(seed, layer as u64 + 1), u64::MAX);
    let draw = |position: usize| f64::from(uniform(mix(stream, position as u64 + 1)));
    let bias = |expert: usize| (std / 2.0 * (12 * expert..12 * expert + 12).map(draw).sum::<f64>()) as f32;
    (0..num_experts).map(bias).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forced_shares_are_met() {
        let shares = [0.4, 0.4, 0.1, 0.1];
        let chosen = choose_by_shares(&shares, 1000, 2);
        for (expert, share) in shares.iter().enumerate() {
            let n = chosen.iter().filter(|&&e| e as usize == expert).count();
            assert!((n as f64 - share * 2000.0).abs() <= 1.0, "expert {expert}: {n}");
        }
        assert!(chosen.chunks(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn impossible_forcing_is_refused() {
        for forcing in [
            RouterForcing::Biased(-1.0),
            RouterForcing::Biased(f64::INFINITY),
            RouterForcing::Shares(vec![1.0]),
            RouterForcing::Shares(vec![0.6, 0.4, 0.0, 0.0]),
            RouterForcing::Shares(vec![0.2; 4]),
            RouterForcing::Shares(vec![0.5, 0.5, 0.25, -0.25]),
            RouterForcing::Shares(vec![f64::NAN, 0.5, 0.25, 0.25]),
        ] {
            let error = forcing.check(4, 2).unwrap_err().to_string();
            assert!(error.contains("moe_router_force"), "{forcing:?}: {error}");
        }
    }

    /// Mean 0 and the given deviation within five standard errors; of a variance it is the variance times sqrt(2 / n).
    #[test]
    fn biases_have_their_deviation() {
        let biases = biases(3.0, 10_000, 5, 0);
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / 1e4;
        let average = mean(&mut biases.iter().map(|&b| f64::from(b)));
        let variance = mean(&mut biases.iter().map(|&b| f64::from(b).powi(2)));
        assert!(average.abs() < 5.0 * 0.03, "{average}");
        assert!((variance - 9.0).abs() < 5.0 * 9.0 * 2e-4f64.sqrt(), "{variance}");
    }

    #[cfg(feature = "flex")]
    #[test]
    fn choices_are_computed_once_a_size() {
        let (device, shares) = (Device::flex(), [0.5, 0.3, 0.2]);
        let ints = |tensor: Tensor<2, Int>| tensor.into_data().iter::<i32>().collect::<Vec<_>>();
        let mut chosen = None;
        let first = choose_once(&mut chosen, &shares, 20, 2, &device);
        assert_eq!(ints(first), choose_by_shares(&shares, 20, 2));
        // Marked, so that it is seen where the same one is used again.
        chosen = chosen.map(|all| all + 10);
        let marked = |tokens| choose_by_shares(&shares, tokens, 2).iter().map(|e| e + 10).collect::<Vec<_>>();
        for tokens in [20, 7, 0, 20] {
            assert_eq!(ints(choose_once(&mut chosen, &shares, tokens, 2, &device)), marked(tokens));
        }
        assert_eq!(ints(choose_once(&mut chosen, &shares, 21, 2, &device)), choose_by_shares(&shares, 21, 2));
    }
}
