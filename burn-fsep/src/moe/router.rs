use burn::{
    module::{Module, Param},
    tensor::{DType, Device, FloatDType, Tensor, TensorData},
};

use super::{RouterOutput, tokens::check_dtype};
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

impl TopKRouter {
    pub(super) fn new(
        [hidden, experts]: [usize; 2],
        topk: usize,
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
        Self { weight: Param::from_data(TensorData::new(values, [hidden, experts]), device), topk, compute_dtype }
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
        let router = TopKRouter::new([4, 3], 2, None, 7, 2, &Device::flex());
        let bits: Vec<u32> = router.weight.val().into_data().iter::<f32>().map(f32::to_bits).collect();
        assert_eq!(
            [0, 1, 2, 3, 4, 11].map(|position| bits[position]),
            [1047866418, 3201759695, 3198862139, 1053183783, 1042784614, 3188577374]
        );
    }
}
