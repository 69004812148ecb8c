//! Burn's own GPU backends: what CI runs of the suite on them. All of it is `cargo test -p burn-fsep -p burn-fsep-tests --features
//! burn-fsep-tests/webgpu`, with `,burn-fsep-tests/fusion` also where Burn joins operations.
#![cfg(any(feature = "cuda", feature = "vulkan", feature = "webgpu"))]

use burn::tensor::{Device, DeviceType, Tensor};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntimeConfig,
    launch::{RankConfig, RankDevice},
    moe::ExpertActivation,
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{
    GradientSync, HandTraining, LayoutSource, ParityCase, SplitAny, check_parity, dense_loss_curve_on, launch,
    launch_config, plain_device, task_items, train_by_hand,
};

const SEED: u64 = 3;

/// Ranks, experts, slots, top-k, tokens of each rank: with none on some, padding of shards, and experts without any.
#[test]
fn the_layer_is_the_dense_one() {
    let mut worst = 0.0f64;
    for (slots, topk, tokens) in
        [(8, 2, vec![9]), (5, 1, vec![9, 9]), (4, 2, vec![1, 4, 7, 10]), (2, 4, vec![5; 4]), (3, 2, vec![0, 11, 0, 0])]
    {
        for split in [SplitAny::MinMax, SplitAny::Random] {
            let config = FSEPMoEConfig::new(6, 7, 8).with_moe_router_topk(topk);
            let case = ParityCase { config, slots, tokens: tokens.clone(), groups: 1, split, steps: 2, seed: 5 };
            worst = worst.max(check_parity(&case, 1e-5));
        }
    }
    println!("largest relative error {worst:.2e}");
}

#[test]
fn every_activation_is_that_of_the_dense_layer() {
    for activation in [
        ExpertActivation::ClampedSwiGlu { alpha: 1.702, limit: 0.5 },
        ExpertActivation::Geglu,
        ExpertActivation::Gelu,
        ExpertActivation::ReluSquared,
    ] {
        let config = FSEPMoEConfig::new(6, 7, 8).with_activation(activation);
        let case =
            ParityCase { config, slots: 5, tokens: vec![6, 3], groups: 1, split: SplitAny::MinMax, steps: 2, seed: 9 };
        check_parity(&case, 1e-5);
    }
}

#[test]
fn training_is_that_of_the_dense_model_on_flex() {
    let (steps, batch, clip) = (50, 16, 0.5);
    let items = task_items(steps * batch, 1);
    let expected = dense_loss_curve_on(&Device::flex().autodiff(), SEED, steps, batch, &items, clip);
    for (layouts, sync) in [
        (LayoutSource::Planner(PlannerStrategy::MinMax), GradientSync::AfterBackward),
        (LayoutSource::Random, GradientSync::Buckets(300)),
    ] {
        let training = HandTraining { steps, batch, clip, layouts, sync };
        let results = launch(&launch_config(4), |comm| -> Result<_, FsepError> {
            let config = FsepRuntimeConfig::new().with_seed(SEED).with_dispatcher(|| SplitAny::MinMax.dispatcher());
            train_by_hand(&config.init(comm)?, &items, &training)
        });
        let mut worst = 0.0f32;
        for result in results.into_iter().map(Result::unwrap) {
            assert!(result.layouts >= 2, "{layouts:?}: {} new layouts", result.layouts);
            assert_eq!(result.losses.len(), expected.len());
            for (ours, expected) in result.losses.iter().zip(&expected) {
                worst = worst.max((ours - expected).abs() / expected);
            }
        }
        println!("{layouts:?}: largest relative error of a loss {worst:.2e}");
        // The model's other layers are Burn's, whose products in single precision are of TF32 on NVIDIA's matrix cores: ten bits.
        let allowed = if cfg!(feature = "cuda") { 5e-3 } else { 1e-4 };
        assert!(worst <= allowed, "{layouts:?}: {worst:.2e}");
    }
}

#[test]
fn ranks_take_the_machines_devices() {
    let config = RankConfig::new().with_threads(2).with_device(RankDevice::Kind(DeviceType::Wgpu));
    let sum = config.run(|rank| -> Result<f32, FsepError> {
        assert!(rank.gpu.is_none());
        Ok(Tensor::<1>::ones([3], &rank.device).sum().into_scalar::<f32>())
    });
    assert_eq!(sum.unwrap(), 3.0);
    assert_ne!(plain_device(), Device::flex());
}
