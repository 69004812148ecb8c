use std::fmt;

use burn::{
    module::{Module, Param},
    tensor::{DType, Device, Distribution, FloatDType, Tensor, TensorData},
};
use serde::{Deserialize, Serialize};

use super::{ExpertBiasConfig, RouterOutput, TopKRouterConfig, choice, tokens::check_dtype};
use crate::{
    FsepError,
    burn_compat::Metadata,
    ops::product,
    shard::{mix, uniform},
};

/// A router that gives each token to the `K` experts with the best scores, as [`TopKRouterConfig`] says. Of experts with equal
/// scores the one with the lower index is better, on every backend.
///
/// By default a softmax router whose probabilities of the chosen experts are normalised to sum 1 (Mixtral). For `K = 1` the
/// expert's output is weighted by its probability as it is (Switch Transformer, eq. 2): normalised, it would be 1, and the router
/// would get no gradient from the model's loss.
#[derive(Module, Debug)]
pub struct TopKRouter {
    // Before the parameters, so that mappers know what they meet.
    info: Metadata<RouterInfo>,
    /// `[D, E]`, replicated on all ranks.
    pub weight: Param<Tensor<2>>,
    /// Added to the logits, if they have a bias. `[E]`
    pub bias: Option<Param<Tensor<1>>>,
    /// Added to the scores where experts are chosen, and to nothing else, if loads are balanced so. No gradient reaches it;
    /// [`update_expert_biases`](crate::train::update_expert_biases) changes it. `[E]`
    pub expert_bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    config: TopKRouterConfig,
    #[module(skip)]
    topk: usize,
    #[module(skip)]
    compute_dtype: Option<FloatDType>,
}

/// What mappers are to know of a router: those that update its bias.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct RouterInfo {
    /// The number of the router's layer in its runtime.
    pub router_of_layer: usize,
    /// How the bias on its choice is updated, if it has one: rate, and whether the biases' mean stays.
    pub expert_bias: Option<(f64, bool)>,
}

impl fmt::Display for RouterInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.expert_bias {
            Some((rate, _)) => write!(f, "of layer {}, expert bias at a rate of {rate}", self.router_of_layer),
            None => write!(f, "of layer {}", self.router_of_layer),
        }
    }
}

impl TopKRouter {
    pub(super) fn new(
        [hidden, experts]: [usize; 2],
        topk: usize,
        config: &TopKRouterConfig,
        compute_dtype: Option<FloatDType>,
        seed: u64,
        layer: usize,
        device: &Device,
    ) -> Self {
        // The stream before those of the layer's experts, by position as they are.
        let stream = mix(mix(seed, layer as u64 + 1), 0);
        let bound = 1.0 / (hidden as f32).sqrt();
        let draw = |position: usize| bound * uniform(mix(stream, position as u64 + 1));
        let values: Vec<f32> = (0..hidden * experts).map(draw).collect();
        let zeros = || Param::from_tensor(Tensor::<1>::zeros([experts], (device, DType::F32)));
        let expert_bias =
            config.expert_bias.map(|ExpertBiasConfig { update_rate, zero_mean }| (update_rate, zero_mean));
        Self {
            info: Metadata(RouterInfo { router_of_layer: layer, expert_bias }),
            weight: Param::from_data(TensorData::new(values, [hidden, experts]), device),
            bias: config.logit_bias.then(zeros),
            expert_bias: config.expert_bias.map(|_| zeros().set_require_grad(false)),
            config: config.clone(),
            topk,
            compute_dtype,
        }
    }

    /// Experts per token `K`.
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// How it chooses and weighs experts.
    pub fn config(&self) -> &TopKRouterConfig {
        &self.config
    }

    /// Routes tokens. `[T, D] -> RouterOutput`. A token whose logits leave no scores gets no expert: one is
    /// not a number, or, with softmax, plus infinity.
    ///
    /// # Errors
    ///
    /// [`FsepError::Shape`] if hidden size or element type are not the router's.
    pub fn forward(&self, hidden: Tensor<2>) -> Result<RouterOutput, FsepError> {
        let dtype = hidden.dtype();
        let logits = self.logits(hidden)?;
        Ok(self.choose(logits, dtype))
    }

    /// In single precision, as scores and losses are, also where the product is not. `[T, D] -> [T, E]`
    pub(super) fn logits(&self, hidden: Tensor<2>) -> Result<Tensor<2>, FsepError> {
        let (width, expected) = (hidden.dims()[1], self.weight.dims()[0]);
        if width != expected {
            return Err(FsepError::Shape {
                what: "hidden size of the MoE layer's input".into(),
                expected: expected.to_string(),
                actual: width.to_string(),
            });
        }
        check_dtype(hidden.dtype(), self.compute_dtype.map_or(self.weight.dtype(), DType::from))?;
        let weight = self.weight.val();
        let dtype = self.config.dtype.map_or(hidden.dtype(), DType::from);
        let is_trained = hidden.is_tracked() || weight.is_tracked();
        let mut hidden = hidden.cast(dtype);
        let eps = self.config.input_jitter_eps;
        if eps > 0.0 && is_trained {
            hidden = hidden.clone() * hidden.random_like(Distribution::Uniform(1.0 - eps, 1.0 + eps));
        }
        let logits = product(hidden, weight.cast(dtype));
        let logits = match &self.bias {
            Some(bias) => logits + bias.val().cast(dtype).unsqueeze(),
            None => logits,
        };
        Ok(logits.cast(FloatDType::F32))
    }

    /// The experts of each token and their weights, of this type. `logits`: `[T, E]`
    pub(super) fn choose(&self, logits: Tensor<2>, dtype: DType) -> RouterOutput {
        let bias = self.expert_bias.as_ref().map(|bias| bias.val().inner().cast(FloatDType::F32));
        choice::top_k(logits, &self.config, bias, self.topk, dtype)
    }

    /// The weights of experts that somebody else has chosen. `logits`: `[T, E]`, `chosen`: `[T, K]`
    pub(super) fn weigh(&self, logits: Tensor<2>, chosen: Tensor<2, burn::tensor::Int>, dtype: DType) -> RouterOutput {
        let scores = choice::scores(&logits, &self.config);
        choice::weigh(logits, scores, chosen, &self.config, dtype)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::FSEPMoEConfig;

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

    /// On every platform and in every version. These are Python's.
    #[test]
    fn values_of_a_seed_are_fixed() {
        let router = TopKRouter::new([4, 3], 2, &TopKRouterConfig::new(), None, 7, 2, &Device::flex());
        let bits: Vec<u32> = router.weight.val().into_data().iter::<f32>().map(f32::to_bits).collect();
        assert_eq!(
            [0, 1, 2, 3, 4, 11].map(|position| bits[position]),
            [1047866418, 3201759695, 3198862139, 1053183783, 1042784614, 3188577374]
        );
    }
}
