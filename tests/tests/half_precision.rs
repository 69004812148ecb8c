//! The layer in bf16, or f16 where the device has no bf16, differs from f32 at most twice as much as the same layer of plain
//! operations does.
//!
//! In a file of its own: a device's element type is set once in a process.
#![cfg(any(feature = "libtorch", feature = "cuda", feature = "vulkan", feature = "webgpu"))]

use burn::{
    module::Param,
    tensor::{Device, FloatDType, IntDType, Tensor, TensorData},
};
use burn_fsep::{
    FSEPMoEConfig, FsepRuntime,
    moe::{ExpertActivation, RouterForcing},
    shard::ExpertShape,
};
use burn_fsep_tests::plain_device;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Output, and gradients of input, router and experts.
type Values = [TensorData; 4];

fn f32_data<const D: usize>(tensor: Tensor<D>) -> TensorData {
    tensor.cast(FloatDType::F32).into_data()
}

/// Runs a layer of `T` tokens; `forward` gives its output, `parameters` those of router and experts.
fn step(
    device: &Device,
    inputs: &[TensorData; 2],
    forward: impl FnOnce(Tensor<2>) -> Tensor<2>,
    parameters: [Tensor<2>; 2],
) -> Values {
    let [x, target] = inputs.clone().map(|data| Tensor::<2>::from_data(data, device));
    let x = x.require_grad();
    let output = forward(x.clone());
    let grads = (output.clone() * target).sum().backward();
    let [router, experts] = parameters;
    let gradients = [x, router, experts].map(|tensor| f32_data(tensor.grad(&grads).expect("a gradient")));
    let [x, router, experts] = gradients;
    [f32_data(output.inner()), x, router, experts]
}

/// Root mean square of the differences over that of the expected values: the largest difference would be a matter of luck.
fn rms_error(actual: &TensorData, expected: &TensorData) -> f64 {
    assert_eq!(actual.shape(), expected.shape());
    let pairs = || actual.iter::<f64>().zip(expected.iter::<f64>());
    let squares = |value: fn((f64, f64)) -> f64| pairs().map(|pair| value(pair).powi(2)).sum::<f64>();
    (squares(|(a, b)| a - b) / squares(|(_, b)| b)).sqrt()
}

#[test]
fn half_precision_is_as_exact_as_plain_operations() {
    let mut device = plain_device();
    let Some(dtype) = [FloatDType::BF16, FloatDType::F16].into_iter().find(|&dtype| device.supports_dtype(dtype))
    else {
        return eprintln!("skipped: {device:?} has no half precision");
    };
    let ints = if device.supports_dtype(IntDType::I64) { IntDType::I64 } else { IntDType::I32 };
    println!("{dtype:?}");
    device.configure((dtype, ints)).expect("the device was not used before");
    let (half, full) = (device.autodiff(), Device::flex().autodiff());
    let clamped = ExpertActivation::ClampedSwiGlu { alpha: 1.702, limit: 1.0 };
    let experts = [
        (ExpertActivation::SwiGlu, false),
        (ExpertActivation::SwiGlu, true),
        (clamped, true),
        (ExpertActivation::Geglu, false),
        (ExpertActivation::Gelu, true),
        (ExpertActivation::ReluSquared, false),
    ];
    for (activation, bias) in experts {
        check(activation, bias, &half, &full);
    }
}

fn check(activation: ExpertActivation, bias: bool, half: &Device, full: &Device) {
    // Many tokens a slot, few, none at all for some, and sizes that no vector divides.
    for (hidden, ffn, experts, topk, tokens) in
        [(64, 96, 8, 2, 100), (64, 32, 2, 1, 2100), (256, 128, 16, 4, 64), (48, 40, 16, 2, 3), (20, 12, 4, 1, 50)]
    {
        let shape = format!("{activation:?}, bias {bias}, D={hidden} F={ffn} E={experts} K={topk} T={tokens}");
        let shares = (0..experts).map(|expert| 2.0 / (experts * (experts + 1)) as f64 * (expert + 1) as f64).collect();
        // Forced: rounding could change which expert is chosen.
        let config = FSEPMoEConfig::new(hidden, ffn, experts)
            .with_moe_router_topk(topk)
            .with_activation(activation)
            .with_add_bias_linear(bias)
            .with_moe_router_force(Some(RouterForcing::Shares(shares)));
        let mut random = StdRng::seed_from_u64(tokens as u64);
        let mut uniform = |dims: [usize; 2], bound: f32| {
            let values = (0..dims[0] * dims[1]).map(|_| random.random_range(-bound..bound)).collect::<Vec<_>>();
            TensorData::new(values, dims)
        };
        let inputs = [uniform([tokens, hidden], 2.0), uniform([tokens, hidden], 2.0)];
        // Biases are initialised as zeros.
        let shape_of_expert = ExpertShape { gated: activation.is_gated(), bias, ..ExpertShape::new(hidden, ffn) };
        let values = uniform([experts, shape_of_expert.num_params()], 1.5 / (hidden as f32).sqrt());
        let with_values = |weight: Param<Tensor<2>>, device: &Device| {
            weight.map(|_| Tensor::from_data(values.clone(), device).require_grad())
        };
        let dense = |device: &Device| {
            let mut layer = config.init_dense(0, 0, device).expect("the configuration is possible");
            layer.weight = with_values(layer.weight, device);
            let parameters = [layer.router.weight.val(), layer.weight.val()];
            step(device, &inputs, |x| layer.forward(x), parameters)
        };
        let exact = dense(full);
        let plain = dense(half);
        let mut layer = config.init(&FsepRuntime::single(), half);
        layer.experts.weight = with_values(layer.experts.weight, half);
        let parameters = [layer.router.weight.val(), layer.experts.weight.val()];
        let ours = step(half, &inputs, |x| layer.forward(x), parameters);
        for (what, ((ours, plain), exact)) in ["output", "input gradient", "router gradient", "experts' gradient"]
            .into_iter()
            .zip(ours.iter().zip(&plain).zip(&exact))
        {
            let (ours, plain) = (rms_error(ours, exact), rms_error(plain, exact));
            println!("{shape}, {what}: {ours:.1e}, plain operations {plain:.1e}");
            assert!(ours <= 2.0 * plain, "{shape}, {what}: {ours:.1e}, plain operations {plain:.1e}");
        }
    }
}
