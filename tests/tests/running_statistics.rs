//! Running statistics are no parameters: clones of a module share them, and each rank has its own.

use burn::{
    nn::{BatchNorm, BatchNormConfig},
    optim::{AdamWConfig, GradientsParams, SgdConfig},
    tensor::{FloatDType, Tensor},
};
use burn_fsep::{
    FsepError, FsepRuntime,
    checkpoint::{CheckpointConfig, TrainingProgress, load, save},
    comm::local::LaunchConfig,
    train::{GradientBucketsConfig, TrainerConfig},
};
use burn_fsep_tests::{device, launch};

fn norm() -> BatchNorm {
    BatchNormConfig::new(3).init(&device())
}

/// One that has seen inputs: each forward pass takes note of the one before.
fn norm_of(scale: f32) -> BatchNorm {
    let norm = norm();
    (0..2).for_each(|_| drop(norm.forward(input(scale))));
    norm
}

/// `[B, 3]`
fn input(scale: f32) -> Tensor<2> {
    Tensor::from_data([[scale, 0.0, 2.0], [3.0 * scale, 1.0, -2.0]], &device())
}

fn mean(norm: &BatchNorm) -> Vec<f32> {
    norm.running_mean.value().into_data().try_to_vec().unwrap()
}

#[test]
#[should_panic(expected = "a BatchNorm cannot compute in another type")]
fn they_are_not_prepared_for_another_type() {
    let buckets = GradientBucketsConfig::new().with_compute_dtype(Some(FloatDType::BF16)).init(&FsepRuntime::single());
    buckets.prepare(&norm(), &input(1.0));
}

#[test]
fn a_checkpoint_that_cannot_be_loaded_leaves_them() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = FsepRuntime::single();
    let model = norm_of(1.0);
    let grads = GradientsParams::from_grads(model.forward(input(1.0)).powf_scalar(3.0).sum().backward(), &model);
    let mut optimizer = AdamWConfig::new().init();
    let model = optimizer.step(0.1, model, grads);
    let path = save(folder.path(), &runtime, &model, &optimizer, &TrainingProgress::new(1)).unwrap();
    let saved = mean(&model);

    let other = norm_of(7.0);
    let before = mean(&other);
    assert_ne!(before, saved);
    assert!(load(&path, &runtime, &other, &SgdConfig::new().init()).is_err());
    assert_eq!(mean(&other), before);
    let loaded = load(&path, &runtime, &other, &optimizer).unwrap();
    assert_eq!(mean(&loaded.model), saved);
}

#[test]
fn replicas_whose_statistics_differ_are_no_error() {
    let means = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let config = TrainerConfig::new().with_check_replicas_every(Some(1));
        let mut trainer = config.init(&runtime, norm(), SgdConfig::new().init())?;
        for _ in 0..4 {
            let input = input(1.0 + runtime.rank() as f32);
            trainer.step(0.1, |norm| norm.forward(input).powf_scalar(3.0).sum())?;
        }
        Ok(mean(trainer.model()))
    });
    let means: Vec<_> = means.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect();
    assert_ne!(means[0], means[1]);
}

#[test]
fn a_trainers_checkpoint_has_rank_0s() {
    let folder = tempfile::tempdir().unwrap();
    let means = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let checkpoints = CheckpointConfig::new(folder.path()).with_every(2);
        let config = TrainerConfig::new().with_checkpoints(checkpoints.clone());
        let mut trainer = config.init(&runtime, norm(), SgdConfig::new().init())?;
        for _ in 0..2 {
            let input = input(1.0 + runtime.rank() as f32);
            trainer.step(0.1, |norm| norm.forward(input).powf_scalar(3.0).sum())?;
        }
        let trained = mean(trainer.model());
        let loaded = checkpoints.init(&runtime)?.load_newest_whole(&norm(), trainer.optimizer())?.unwrap();
        // What was trained on is left alone.
        assert_eq!(mean(trainer.model()), trained);
        Ok((trained, mean(&loaded.model)))
    });
    let means: Vec<_> = means.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect();
    assert_ne!(means[0].0, means[1].0);
    assert_eq!([&means[0].1, &means[1].1], [&means[0].0; 2]);
}
