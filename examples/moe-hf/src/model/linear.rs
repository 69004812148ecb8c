use burn::{
    module::{Initializer, Param},
    nn::{Linear, LinearConfig, RmsNorm},
    tensor::{DType, Device, Tensor},
};

/// A projection with the initial values of transformers; those of a model's folder replace them.
pub(super) fn linear(input: usize, output: usize, bias: bool, device: &Device) -> Linear {
    let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
    let weight = LinearConfig::new(input, output).with_bias(false).with_initializer(initializer).init(device).weight;
    Linear { weight, bias: bias.then(|| Param::from_tensor(Tensor::zeros([output], device))) }
}

/// RMS normalisation, in single precision inside as transformers computes it. `[.., D] -> [.., D]`
pub(super) fn rms_norm<const R: usize>(norm: &RmsNorm, x: Tensor<R>) -> Tensor<R> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let mean_square = x.clone().square().mean_dim(R - 1);
    let normalised = x * (mean_square + norm.epsilon).sqrt().recip();
    normalised.cast(dtype) * norm.gamma.val().cast(dtype).unsqueeze()
}
