use burn::{
    module::{Module, Param},
    tensor::{DType, Device, FloatDType, Int, Tensor, TensorData, activation::softmax},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{StandardNormal, Uniform};

use super::{FSEPMoEConfig, RouterOutput, tokens::check_dtype};
use crate::{FsepError, shard::mix};

/// Routing that does not come from the router, for throughput tests.
#[derive(Debug, Clone, PartialEq)]
pub enum RouterForcing {
    /// The router decides.
    Off,
    /// Fixed biases are added to the logits. Shape `[E]`.
    Bias(Vec<f32>),
    /// Experts get exactly these shares of the assignments. Shape `[E]`.
    Shares(Vec<f64>),
}

impl RouterForcing {
    pub(super) fn biased(std: f64, experts: usize, seed: u64, layer: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(mix(mix(seed, layer as u64 + 1), u64::MAX - 1));
        Self::Bias((0..experts).map(|_| rng.sample::<f64, _>(StandardNormal) * std).map(|b| b as f32).collect())
    }
}

/// A softmax router: each token goes to its `K` most probable experts, whose probabilities are normalised to sum 1
/// (Mixtral). For `K = 1` the expert's output is weighted by its probability as it is (Switch Transformer, eq. 2): normalised,
/// it would be 1, and the router would get no gradient from the model's loss.
#[derive(Module, Debug)]
pub struct TopKRouter {
    /// `[D, E]`, replicated on all ranks.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    topk: usize,
    #[module(skip)]
    forcing: RouterForcing,
    #[module(skip)]
    compute_dtype: Option<FloatDType>,
}

impl TopKRouter {
    pub(super) fn new(
        config: &FSEPMoEConfig,
        forcing: RouterForcing,
        seed: u64,
        layer: usize,
        device: &Device,
    ) -> Self {
        let (hidden, experts) = (config.hidden_size, config.num_moe_experts);
        let mut rng = StdRng::seed_from_u64(mix(mix(seed, layer as u64 + 1), u64::MAX));
        let bound = 1.0 / (hidden as f32).sqrt();
        let uniform = Uniform::new_inclusive(-bound, bound).expect("a positive hidden size gives a valid range");
        let values: Vec<f32> = (0..hidden * experts).map(|_| rng.sample(uniform)).collect();
        Self {
            weight: Param::from_data(TensorData::new(values, [hidden, experts]), device),
            topk: config.moe_router_topk,
            forcing,
            compute_dtype: config.compute_dtype,
        }
    }

    /// Experts per token `K`.
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// Routes tokens. `[T, D] -> RouterOutput`. Each row of probabilities sums to 1, unless `K` is 1; a token whose logits leave
    /// no probabilities (not a number, or infinite) gets no expert.
    ///
    /// # Errors
    ///
    /// [`FsepError::Shape`] if hidden size or element type are not the router's.
    pub fn forward(&self, hidden: Tensor<2>) -> Result<RouterOutput, FsepError> {
        let [num_tokens, width] = hidden.dims();
        let [expected, num_experts] = self.weight.dims();
        if width != expected {
            return Err(FsepError::Shape {
                what: "hidden size of the MoE layer's input".into(),
                expected: expected.to_string(),
                actual: width.to_string(),
            });
        }
        let dtype = hidden.dtype();
        check_dtype(dtype, self.compute_dtype.map_or(self.weight.dtype(), DType::from))?;
        // The softmax and the losses are in single precision, also where the product is not.
        let mut logits = hidden.matmul(self.weight.val().cast(dtype)).cast(FloatDType::F32);
        if let RouterForcing::Bias(bias) = &self.forcing {
            let bias = TensorData::new(bias.clone(), [1, num_experts]);
            logits = logits.clone() + Tensor::<2>::from_data(bias, &logits.device());
        }
        let scores = softmax(logits.clone(), 1);
        let (chosen, experts) = match &self.forcing {
            RouterForcing::Shares(shares) => {
                let data = TensorData::new(choose_by_shares(shares, num_tokens, self.topk), [num_tokens, self.topk]);
                let chosen = Tensor::<2, Int>::from_data(data, &scores.device());
                (chosen.clone(), chosen)
            }
            _ => {
                let (best, chosen) = scores.clone().detach().topk_with_indices(self.topk, 1);
                // Logits that are not finite give probabilities that are no numbers, and any expert: marked here, on the
                // device, and noticed where the counts are read anyway.
                let experts = chosen.clone().mask_fill(best.is_nan(), num_experts as i64);
                (chosen, experts)
            }
        };
        let probs = scores.clone().gather(1, chosen);
        // Of an only choice the share is always 1, from which the router would learn nothing.
        let probs = if self.topk == 1 { probs } else { probs.clone() / probs.sum_dim(1) };
        let probs = probs.cast(dtype);
        Ok(RouterOutput::new(probs, experts.inner()).with_scores(scores).with_logits(logits))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "flex")]
    #[test]
    fn losses_of_a_router_in_half_precision_are_in_single_precision() {
        let device = Device::flex().autodiff();
        let config = FSEPMoEConfig::new(8, 12, 4)
            .with_moe_aux_loss_coeff(1e-2)
            .with_moe_z_loss_coeff(1e-3)
            .with_compute_dtype(Some(FloatDType::BF16));
        let runtime = crate::FsepRuntime::single();
        let layer = config.init(&runtime, &device);
        let x = TensorData::new((0..40).map(|i| (0.7 * i as f32).sin()).collect(), [5, 8]);
        let x = Tensor::<2>::from_data(x, &device).cast(FloatDType::BF16);
        let output = layer.forward_with_losses(x);
        let aux_loss = output.aux_loss.expect("both losses are on");
        assert_eq!((output.hidden.dtype(), aux_loss.dtype()), (DType::BF16, DType::F32));
        let grads = (output.hidden.cast(FloatDType::F32).square().sum() + aux_loss).backward();
        assert!(layer.router.weight.val().grad(&grads).is_some());
    }

    #[cfg(feature = "flex")]
    #[test]
    fn the_router_learns_from_its_only_choice() {
        let device = Device::flex().autodiff();
        let layer = FSEPMoEConfig::new(8, 12, 4).with_moe_router_topk(1).init_dense(5, 0, &device).unwrap();
        let x = TensorData::new((0..40).map(|i| (0.7 * i as f32).sin()).collect(), [5, 8]);
        let grads = layer.forward(Tensor::<2>::from_data(x, &device)).sum().backward();
        let gradient = layer.router.weight.val().grad(&grads).unwrap();
        let largest = gradient.abs().max().into_scalar::<f32>();
        assert!(largest > 1e-6, "{largest}");
    }

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
}
