//! The fused AdamW does the steps of Burn's. On a GPU (feature `libtorch`) this compares its kernel, elsewhere only what is
//! around it.

use burn::{
    module::{Module, Param},
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
    tensor::{DType, Tensor, TensorData},
};
use burn_fsep::train::FusedAdamWConfig;
use burn_fsep_tests::{assert_close, device};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Parameters of several ranks, of sizes that no vector divides.
#[derive(Module, Debug)]
struct Model {
    bias: Param<Tensor<1>>,
    weight: Param<Tensor<2>>,
    cube: Param<Tensor<3>>,
}

fn values<const D: usize>(shape: [usize; D], seed: u64) -> TensorData {
    let mut random = StdRng::seed_from_u64(seed);
    let values = (0..shape.iter().product()).map(|_| random.random_range(-1.0f32..1.0)).collect::<Vec<_>>();
    TensorData::new(values, shape)
}

fn model(dtype: DType) -> Model {
    fn param<const D: usize>(shape: [usize; D], seed: u64, dtype: DType) -> Param<Tensor<D>> {
        Param::from_tensor(Tensor::from_data(values(shape, seed), (&device(), dtype)))
    }
    Model { bias: param([1], 1, dtype), weight: param([37, 111], 2, dtype), cube: param([4, 8, 16], 3, dtype) }
}

fn grads(model: &Model, step: u64) -> GradientsParams {
    fn loss<const D: usize>(param: &Param<Tensor<D>>, seed: u64) -> Tensor<1> {
        let factors = Tensor::<D>::from_data(values(param.dims(), seed), (&device(), param.dtype()));
        (param.val() * factors).sum()
    }
    // The weight's gradient is a transposed view.
    let weight = model.weight.val().transpose();
    let factors = Tensor::<2>::from_data(values(weight.dims(), 10 * step + 2), (&device(), weight.dtype()));
    let loss = loss(&model.bias, 10 * step + 1) + (weight * factors).sum() + loss(&model.cube, 10 * step + 3);
    GradientsParams::from_grads(loss.backward(), model)
}

fn train(mut model: Model, optimizer: &mut ModuleOptimizer, steps: std::ops::Range<u64>) -> Model {
    for step in steps {
        let grads = grads(&model, step);
        model = optimizer.step(1e-2, model, grads);
    }
    model
}

fn data(model: &Model) -> [TensorData; 3] {
    fn data<const D: usize>(param: &Param<Tensor<D>>) -> TensorData {
        param.val().inner().cast(DType::F32).into_data()
    }
    [data(&model.bias), data(&model.weight), data(&model.cube)]
}

fn assert_models(what: &str, actual: &Model, expected: &Model, tolerance: f64) {
    for (actual, expected) in data(actual).iter().zip(&data(expected)) {
        assert_close(what, actual, expected, tolerance);
    }
}

#[test]
fn steps_are_those_of_burns_adamw() {
    for cautious in [false, true] {
        for (decay, epsilon) in [(0.0, 1e-5), (0.5, 1e-8)] {
            let plain = AdamWConfig::new().with_beta_2(0.99).with_weight_decay(decay).with_epsilon(epsilon);
            let fused = FusedAdamWConfig::new().with_beta_2(0.99).with_weight_decay(decay).with_epsilon(epsilon);
            let mut plain = plain.with_cautious_weight_decay(cautious).init();
            let mut fused = fused.with_cautious_weight_decay(cautious).init();
            let start = model(DType::F32);
            let expected = train(start.clone(), &mut plain, 0..10);
            let actual = train(start.clone(), &mut fused, 0..10);
            assert_models(&format!("cautious: {cautious}, decay {decay}"), &actual, &expected, 1e-6);
            assert!(data(&actual)[1] != data(&start)[1]);
        }
    }
}

#[test]
fn other_handles_keep_their_values() {
    let start = model(DType::F32);
    let (before, kept) = (data(&start), start.clone());
    let mut optimizer = FusedAdamWConfig::new().init();
    let first = train(start, &mut optimizer, 0..1);
    assert_eq!(data(&kept), before, "parameters");
    // A copy of the optimizer shares the moments' memory.
    let copy = optimizer.clone();
    let moments = copy.into_bytes().unwrap();
    train(first, &mut optimizer, 1..2);
    assert!(copy.into_bytes().unwrap() == moments, "moments");
    assert!(optimizer.into_bytes().unwrap() != moments, "the comparison sees nothing");
}

#[test]
fn records_are_those_of_burns_adamw() {
    let (mut plain, mut fused) = (AdamWConfig::new().init(), FusedAdamWConfig::new().init());
    let (a, b) = (model(DType::F32), model(DType::F32));
    let a = train(a, &mut plain, 0..3);
    let b = train(b, &mut fused, 0..3);
    // Each goes on with the other's state.
    let mut fused_after_plain = FusedAdamWConfig::new().init().load_record(plain.to_record());
    let mut plain_after_fused = AdamWConfig::new().init().load_record(fused.to_record());
    let expected = train(a.clone(), &mut plain, 3..6);
    assert_models("Burn's record", &train(a, &mut fused_after_plain, 3..6), &expected, 1e-6);
    let expected = train(b.clone(), &mut fused, 3..6);
    assert_models("our record", &train(b, &mut plain_after_fused, 3..6), &expected, 1e-6);
}

#[test]
fn half_precision() {
    let single = train(model(DType::F32), &mut FusedAdamWConfig::new().init(), 0..5);
    for single_precision_moments in [false, true] {
        let config = FusedAdamWConfig::new().with_single_precision_moments(single_precision_moments);
        let half = train(model(DType::BF16), &mut config.init(), 0..5);
        assert_eq!(half.weight.dtype(), DType::BF16);
        assert_models("bf16", &half, &single, 0.02);
    }
}

#[test]
fn moments_take_the_type_that_is_configured_whatever_the_record_has() {
    let mut optimizer = FusedAdamWConfig::new().init();
    let model = train(model(DType::BF16), &mut optimizer, 0..2);
    let config = FusedAdamWConfig::new().with_single_precision_moments(true);
    let mut optimizer = config.init().load_record(optimizer.to_record());
    let expected = data(&model);
    let model = train(model, &mut optimizer, 2..4);
    assert!(data(&model)[1] != expected[1]);
}
