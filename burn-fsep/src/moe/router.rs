use burn::{
    module::{Module, Param},
    tensor::{DType, Device, FloatDType, Int, Tensor, TensorData, activation::softmax},
};

use super::{FSEPMoEConfig, tokens::check_dtype};
use crate::{
    FsepError,
    shard::{mix, uniform},
};

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
    compute_dtype: Option<FloatDType>,
}

/// What a router says of `T` tokens.
#[derive(Debug, Clone)]
pub struct RouterOutput {
    /// Weights of the chosen experts, of the input's type. `[T, K]`
    pub probs: Tensor<2>,
    /// The chosen experts, without autodiff; `E` for a token whose logits leave no probabilities (not a number, or
    /// infinite). `[T, K]`
    pub experts: Tensor<2, Int>,
    /// Probabilities of all experts, in single precision: for the load-balancing loss. `[T, E]`
    pub scores: Option<Tensor<2>>,
    /// In single precision: for the z-loss. `[T, E]`
    pub logits: Option<Tensor<2>>,
}

impl TopKRouter {
    pub(super) fn new(config: &FSEPMoEConfig, seed: u64, layer: usize, device: &Device) -> Self {
        let (hidden, experts) = (config.hidden_size, config.num_moe_experts);
        // The stream before those of the layer's experts, by position as they are.
        let stream = mix(mix(seed, layer as u64 + 1), 0);
        let bound = 1.0 / (hidden as f32).sqrt();
        let draw = |position: usize| bound * uniform(mix(stream, position as u64 + 1));
        let values: Vec<f32> = (0..hidden * experts).map(draw).collect();
        Self {
            weight: Param::from_data(TensorData::new(values, [hidden, experts]), device),
            topk: config.moe_router_topk,
            compute_dtype: config.compute_dtype,
        }
    }

    /// Experts per token `K`.
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// Routes tokens. `[T, D] -> RouterOutput`
    ///
    /// # Errors
    ///
    /// [`FsepError::Shape`] if hidden size or element type are not the router's.
    pub fn forward(&self, hidden: Tensor<2>) -> Result<RouterOutput, FsepError> {
        let dtype = hidden.dtype();
        Ok(RouterOutput::top_k(self.logits(hidden)?, self.topk, dtype))
    }

    /// In single precision, as softmax and losses are, also where the product is not. `[T, D] -> [T, E]`
    pub(super) fn logits(&self, hidden: Tensor<2>) -> Result<Tensor<2>, FsepError> {
        let (width, expected) = (hidden.dims()[1], self.weight.dims()[0]);
        if width != expected {
            return Err(FsepError::Shape {
                what: "hidden size of the MoE layer's input".into(),
                expected: expected.to_string(),
                actual: width.to_string(),
            });
        }
        let dtype = hidden.dtype();
        check_dtype(dtype, self.compute_dtype.map_or(self.weight.dtype(), DType::from))?;
        Ok(hidden.matmul(self.weight.val().cast(dtype)).cast(FloatDType::F32))
    }
}

impl RouterOutput {
    /// The `K` largest logits of each token: chosen by logits, as small probabilities may all be 0. `logits`: `[T, E]`;
    /// `dtype`: the input's.
    pub(super) fn top_k(logits: Tensor<2>, topk: usize, dtype: DType) -> Self {
        let num_experts = logits.dims()[1];
        let (_, chosen) = logits.clone().detach().topk_with_indices(topk, 1);
        let mut output = Self::of_choice(logits, chosen, dtype);
        // Logits that are not finite give probabilities that are no numbers, and any expert: marked here, on the device, and
        // noticed where the counts are read anyway.
        output.experts = output.experts.mask_fill(output.probs.clone().inner().is_nan(), num_experts as i64);
        output
    }

    /// The experts of a choice, which is on the device of the logits. `logits`: `[T, E]`, `chosen`: `[T, K]`
    pub(super) fn of_choice(logits: Tensor<2>, chosen: Tensor<2, Int>, dtype: DType) -> Self {
        let topk = chosen.dims()[1];
        let scores = softmax(logits.clone(), 1);
        let probs = scores.clone().gather(1, chosen.clone());
        // Of an only choice the share is always 1, from which the router would learn nothing.
        let probs = if topk == 1 { probs } else { probs.clone() / probs.sum_dim(1) };
        Self { probs: probs.cast(dtype), experts: chosen.inner(), scores: Some(scores), logits: Some(logits) }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    fn routed(logits: &[f32], topk: usize) -> (Vec<f32>, Vec<i64>) {
        let logits = Tensor::<2>::from_data(TensorData::new(logits.to_vec(), [1, logits.len()]), &Device::flex());
        let output = RouterOutput::top_k(logits, topk, DType::F32);
        (output.probs.into_data().iter().collect(), output.experts.into_data().iter().collect())
    }

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

    /// Probabilities 1/2, 1/4, 1/8, 1/8.
    #[test]
    fn chosen_probabilities_sum_to_one_unless_there_is_only_one() {
        let logits = [4.0f32.ln(), 2.0f32.ln(), 0.0, 0.0];
        for (topk, expected) in [(1, vec![0.5]), (2, vec![2.0 / 3.0, 1.0 / 3.0])] {
            let (probs, experts) = routed(&logits, topk);
            assert_eq!(experts, (0..topk as i64).collect::<Vec<_>>());
            assert!(probs.iter().zip(&expected).all(|(p, e): (_, &f32)| (p - e).abs() < 1e-6), "{probs:?}");
        }
    }

    /// All probabilities but the first are 0.
    #[test]
    fn probabilities_that_underflow_leave_a_choice() {
        assert_eq!(routed(&[200.0, 0.0, -1.0, -2.0], 2), (vec![1.0, 0.0], vec![0, 1]));
        assert_eq!(routed(&[-2.0, -1.0, 0.0, 200.0], 3), (vec![1.0, 0.0, 0.0], vec![3, 2, 1]));
    }

    #[test]
    fn logits_without_probabilities_have_no_expert() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(routed(&[0.0, bad, 1.0], 2).1, [3, 3], "{bad}");
        }
        assert_eq!(routed(&[f32::NEG_INFINITY; 3], 2).1, [3, 3]);
        assert_eq!(routed(&[0.0, f32::NEG_INFINITY, 1.0], 2).1, [2, 0]);
    }

    /// On every platform and in every version. These are Python's.
    #[test]
    fn values_of_a_seed_are_fixed() {
        let router = TopKRouter::new(&FSEPMoEConfig::new(4, 5, 3), 7, 2, &Device::flex());
        let bits: Vec<u32> = router.weight.val().into_data().iter::<f32>().map(f32::to_bits).collect();
        assert_eq!(
            [0, 1, 2, 3, 4, 11].map(|position| bits[position]),
            [1047866418, 3201759695, 3198862139, 1053183783, 1042784614, 3188577374]
        );
    }
}
