use burn::{
    module::{Initializer, Param},
    nn::{Linear, LinearConfig, RmsNorm},
    tensor::{DType, Device, Tensor},
};

use super::positions::is_fused;

/// A projection with the initial values of transformers; those of a model's folder replace them.
pub(super) fn linear(input: usize, output: usize, bias: bool, device: &Device) -> Linear {
    let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
    let weight = LinearConfig::new(input, output).with_bias(false).with_initializer(initializer).init(device).weight;
    Linear { weight, bias: bias.then(|| Param::from_tensor(Tensor::zeros([output], device))) }
}

/// RMS normalisation, in single precision inside as transformers computes it. `[T, D] -> [T, D]`
pub(super) fn rms_norm(norm: &RmsNorm, x: Tensor<2>) -> Tensor<2> {
    let weight = norm.gamma.val();
    if is_fused(&x.device()) {
        #[cfg(feature = "libtorch")]
        return super::fused::rms_norm(x, weight, norm.epsilon);
    }
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let mean_square = x.clone().square().mean_dim(1);
    let normalised = x * (mean_square + norm.epsilon).sqrt().recip();
    normalised.cast(dtype) * weight.cast(dtype).unsqueeze()
}
