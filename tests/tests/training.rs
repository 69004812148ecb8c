//! Training in a loop of one's own equals that of the dense model, with a `Trainer` and part by part.

use std::time::Duration;

use burn::{
    data::dataloader::batcher::Batcher,
    module::Module,
    nn::{Linear, LinearConfig},
    optim::AdamWConfig,
    tensor::{Device, Distribution, Tensor},
};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    checkpoint::{self, CheckpointConfig, list},
    comm::local::LaunchConfig,
    train::{Accumulation, PlannerConfig, Trainer, TrainerConfig},
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{
    GradientSync, HandTraining, LayoutSource, SmallMoe, SplitAny, TaskBatcher, TaskItem, Trained, dense_loss_curve,
    device, fixed_linear, launch, small_slots, task_items, train_by_hand, train_with_trainer,
};

const SEED: u64 = 3;
const STEPS: usize = 200;
const BATCH: usize = 16;
const CLIP: f64 = 0.5;

fn train(ranks: usize, split: SplitAny, layouts: LayoutSource, sync: GradientSync) -> Vec<Trained> {
    let items = task_items(STEPS * BATCH, 1);
    let training = HandTraining { steps: STEPS, batch: BATCH, clip: CLIP, layouts, sync };
    let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
        let config = FsepRuntimeConfig::new().with_seed(SEED).with_dispatcher(move || split.dispatcher());
        train_by_hand(&config.init(comm)?, &items, &training)
    });
    results.into_iter().map(Result::unwrap).collect()
}

/// The largest relative difference of a step's loss.
fn largest_error(losses: &[f32], dense: &[f32]) -> f32 {
    assert_eq!(losses.len(), dense.len());
    let error = |(ours, dense): (&f32, &f32)| {
        assert!(ours.is_finite());
        (ours - dense).abs() / dense
    };
    losses.iter().zip(dense).map(error).fold(0.0, f32::max)
}

fn dense() -> Vec<f32> {
    dense_loss_curve(SEED, STEPS, BATCH, &task_items(STEPS * BATCH, 1), CLIP)
}

#[test]
fn the_loss_curve_is_that_of_the_dense_model() {
    let dense = dense();
    assert!(dense[STEPS - 1] < 0.7 * dense[0], "the model learns: {} to {}", dense[0], dense[STEPS - 1]);
    let after = GradientSync::AfterBackward;
    // The small model has four replicated parameters of 192, 256, 256 and 192 bytes.
    for (ranks, split, layouts, sync) in [
        (2, SplitAny::Even, LayoutSource::Planner(PlannerStrategy::Paper), after),
        (2, SplitAny::MinMax, LayoutSource::Planner(PlannerStrategy::MinMax), GradientSync::Buckets(1)),
        (2, SplitAny::Random, LayoutSource::Random, after),
        (4, SplitAny::Even, LayoutSource::Planner(PlannerStrategy::Paper), after),
        (4, SplitAny::MinMax, LayoutSource::Planner(PlannerStrategy::MinMax), after),
        (4, SplitAny::Random, LayoutSource::Random, GradientSync::Buckets(300)),
    ] {
        let results = train(ranks, split, layouts, sync);
        // The min-max planner keeps a layout that is good enough.
        let enough = match layouts {
            LayoutSource::Random => 9 * STEPS / 10,
            LayoutSource::Planner(PlannerStrategy::Paper) => 10,
            LayoutSource::Planner(_) => 2,
        };
        let first = &results[0];
        assert!(first.layouts >= enough, "{ranks} ranks, {layouts:?}: {} new layouts", first.layouts);
        assert!(first.largest_norm > CLIP, "clipping had nothing to do: {}", first.largest_norm);
        for result in &results {
            let error = largest_error(&result.losses, &dense);
            assert!(error <= 1e-4, "{ranks} ranks, {layouts:?}: {error:.2e}");
            assert_eq!(result.replicated, first.replicated, "replicated parameters differ between ranks");
            // All but the first step's.
            let buckets = match sync {
                GradientSync::Buckets(1) => 4,
                GradientSync::Buckets(_) => 2,
                _ => 0,
            };
            assert_eq!(result.overlapped, buckets * (STEPS - 1), "{ranks} ranks, {sync:?}");
        }
        let error = largest_error(&first.losses, &dense);
        println!("{ranks} ranks, {split:?}, {layouts:?}: {} new layouts, largest error {error:.2e}", first.layouts);
    }
}

#[test]
fn without_gradient_sync_the_loss_curve_is_another_one() {
    let results = train(2, SplitAny::Even, LayoutSource::Random, GradientSync::Off);
    let error = largest_error(&results[0].losses, &dense());
    assert!(error > 1e-3, "the comparison sees nothing: {error:.2e}");
    assert_ne!(results[0].replicated, results[1].replicated);
}

#[test]
fn training_again_gives_the_same_bits() {
    let run = || train(4, SplitAny::MinMax, LayoutSource::Planner(PlannerStrategy::MinMax), GradientSync::Buckets(200));
    for (first, second) in run().iter().zip(run()) {
        assert_eq!(first.losses, second.losses);
        assert_eq!(first.replicated, second.replicated);
    }
}

#[test]
fn a_trainer_makes_the_steps_that_its_parts_make_by_hand() {
    let items = task_items(60 * BATCH, 1);
    for (ranks, layouts, sync) in [
        (2, LayoutSource::Planner(PlannerStrategy::MinMax), GradientSync::Buckets(1)),
        (4, LayoutSource::Random, GradientSync::AfterBackward),
        (4, LayoutSource::Planner(PlannerStrategy::MinMax), GradientSync::Buckets(300)),
    ] {
        let training = HandTraining { steps: 60, batch: BATCH, clip: CLIP, layouts, sync };
        type Train = fn(&FsepRuntime, &[TaskItem], &HandTraining) -> Result<Trained, FsepError>;
        let run = |train: Train| {
            let config = FsepRuntimeConfig::new().with_seed(SEED);
            let results = launch(&LaunchConfig::new(ranks), |comm| train(&config.init(comm)?, &items, &training));
            results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect::<Vec<_>>()
        };
        for (trainer, by_hand) in run(train_with_trainer).iter().zip(run(train_by_hand)) {
            assert_eq!(trainer.replicated, by_hand.replicated, "{ranks} ranks, {layouts:?}, {sync:?}");
            assert_eq!((trainer.layouts, trainer.largest_norm), (by_hand.layouts, by_hand.largest_norm));
            let error = largest_error(&trainer.losses, &by_hand.losses);
            assert!(error < 1e-6, "{error:e}");
        }
    }
}

#[test]
fn a_trainer_goes_on_from_its_checkpoints() {
    let (folder, items) = (tempfile::tempdir().unwrap(), task_items(12 * BATCH, 1));
    let program = |runtime: &FsepRuntime, steps: u64, checkpoints: bool| -> Result<Vec<f32>, FsepError> {
        let mut model = SmallMoe::fsep(runtime, small_slots(runtime.world_size()), &device())?;
        let mut optimizer = AdamWConfig::new().with_epsilon(1e-6).init();
        let planner = PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true);
        let mut config = TrainerConfig::new().with_max_grad_norm(CLIP).with_accumulation_steps(2).with_planner(planner);
        if checkpoints {
            let checkpoints = CheckpointConfig::new(folder.path()).with_every(2).with_background(true);
            config = config.with_checkpoints(checkpoints);
            if let Some(newest) = list(folder.path()).unwrap_or_default().pop() {
                let loaded = checkpoint::load(newest, runtime, &model, &optimizer)?;
                (model, optimizer) = (loaded.model, loaded.optimizer);
                config = config.with_start(loaded.progress);
            }
        }
        let mut trainer: Trainer<SmallMoe> = config.init(runtime, model, optimizer)?;
        let share = BATCH / runtime.world_size();
        while trainer.progress().step < steps {
            // Batches of which no step is made yet are done once more.
            for batch in trainer.progress().iteration.. {
                let start = batch as usize * BATCH + runtime.rank() * share;
                let batch = TaskBatcher.batch(items[start..start + share].to_vec(), &device());
                if trainer.step(1e-2, |model| model.loss(&batch))?.optimizer_step.is_some() {
                    break;
                }
            }
        }
        if steps == 5 {
            // In the middle of a window.
            let batch = TaskBatcher.batch(items[..share].to_vec(), &device());
            trainer.step(1e-2, |model| model.loss(&batch))?;
        }
        Ok(trainer.finish()?.replicated())
    };
    let run = |steps, checkpoints| {
        let results = launch(&LaunchConfig::new(4), |comm| {
            program(&FsepRuntimeConfig::new().with_seed(SEED).init(comm)?, steps, checkpoints)
        });
        results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect::<Vec<_>>()
    };
    let undisturbed = run(6, false);
    assert_ne!(run(5, true), undisturbed);
    let steps: Vec<_> = list(folder.path()).unwrap().iter().map(|path| checkpoint::verify(path).unwrap()).collect();
    let steps: Vec<_> = steps.iter().map(|found| (found.progress.step, found.progress.iteration)).collect();
    assert_eq!(steps, [(2, 4), (4, 8)]);
    assert_eq!(run(6, true), undisturbed, "bit for bit from the step 4");
}

/// Experts that a rank's loss may have nothing to do with.
#[derive(Module, Debug)]
struct Branches {
    moe: FSEPMoE,
    linear: Linear,
}

impl Branches {
    fn new(runtime: &FsepRuntime, device: &Device) -> Result<Self, FsepError> {
        let moe = FSEPMoEConfig::new(8, 8, 4).with_slots_per_rank(Some(3)).try_init(runtime, device)?;
        Ok(Self { moe, linear: fixed_linear(8, 8, 1, device) })
    }

    fn loss(&self, uses_experts: bool, scale: f32) -> Tensor<1> {
        let x = Tensor::<2>::full([3, 8], scale, &self.linear.weight.device());
        let experts = self.moe.forward(x.clone());
        let output = self.linear.forward(x);
        (if uses_experts { output + experts } else { output }).square().mean()
    }
}

#[test]
fn a_trainer_connects_layers_that_a_rank_does_not_use() {
    let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(10));
    let results = launch(&config, |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let model = Branches::new(&runtime, &device())?;
        let mut trainer = TrainerConfig::new().init(&runtime, model, AdamWConfig::new().init())?;
        for _ in 0..3 {
            trainer.step(1e-2, |model| model.loss(runtime.rank() == 0, 1.0))?;
        }
        trainer.finish().map(drop)
    });
    results.into_iter().for_each(|result| result.unwrap_or_else(|error| panic!("{error}")));
}

#[test]
fn a_trainer_goes_on_after_a_gradient_norm_that_is_not_finite() {
    go_on_after_an_infinite_gradient(&TrainerConfig::new().with_max_grad_norm(1.0));
    // Also where nothing is clipped.
    go_on_after_an_infinite_gradient(&TrainerConfig::new());
}

fn go_on_after_an_infinite_gradient(config: &TrainerConfig) {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let model = Branches::new(&runtime, &device())?;
        let mut trainer = config.init(&runtime, model, AdamWConfig::new().init())?;
        trainer.step(1e-2, |model| model.loss(true, 1.0))?;
        let before = trainer.model().linear.weight.val().into_data();
        // Of one rank alone: its loss is not finite, though the experts' inputs are.
        let scale = if runtime.rank() == 1 { f32::INFINITY } else { 1.0 };
        let error = trainer.step(1e-2, |model| model.loss(true, 1.0) * scale).unwrap_err();
        assert_eq!(trainer.model().linear.weight.val().into_data(), before);
        let step = trainer.step(1e-2, |model| model.loss(true, 1.0))?;
        assert_eq!(step.optimizer_step, Some(2));
        Ok((error, trainer.progress().iteration))
    });
    for (error, iteration) in results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))) {
        assert!(matches!(error, FsepError::GradientNorm { step: 2, .. }), "{error}");
        assert_eq!(iteration, 3, "the batch is done, though no step was made of it");
    }
}

#[test]
fn a_discarded_window_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let planner = PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true);
        let config = TrainerConfig::new()
            .with_accumulation_steps(2)
            .with_planner(planner)
            .with_checkpoints(CheckpointConfig::new(folder.path()));
        let layer = layer(&runtime, &device());
        let mut trainer = config.init(&runtime, layer, AdamWConfig::new().init())?;
        let batch = |trainer: &mut Trainer<FSEPMoE>| {
            let x = Tensor::<2>::random([64, 4], Distribution::Default, &device());
            trainer.step(1e-2, |layer| layer.forward(x).square().mean()).map(drop)
        };
        let saved = |trainer: &mut Trainer<FSEPMoE>| -> Result<_, FsepError> {
            trainer.save()?;
            Ok((trainer.progress().clone(), runtime.layout(0)))
        };
        (0..2).try_for_each(|_| batch(&mut trainer))?;
        let before = saved(&mut trainer)?;
        assert_eq!(before.0.records.is_empty(), runtime.rank() > 0, "the planner's");
        batch(&mut trainer)?;
        trainer.discard_window()?;
        assert_eq!(saved(&mut trainer)?, before);
        (0..2).try_for_each(|_| batch(&mut trainer))?;
        assert_ne!(saved(&mut trainer)?.0, before.0);
        Ok(())
    });
    results.into_iter().for_each(|result| result.unwrap_or_else(|error| panic!("{error}")));
}

#[test]
fn gradients_are_not_checked_where_that_is_switched_off() {
    let model = LinearConfig::new(2, 1).init(&device());
    let config = TrainerConfig::new().with_check_gradients(false);
    let mut trainer = config.init(&FsepRuntime::single(), model, AdamWConfig::new().init()).unwrap();
    let x = Tensor::<2>::ones([1, 2], &device());
    let step = trainer.step(1e-2, |model| model.forward(x).sum() * f32::INFINITY).unwrap();
    assert_eq!((step.optimizer_step, step.gradient_norm), (Some(1), None));
    assert!(trainer.model().weight.val().sum().into_scalar::<f32>().is_nan());
}

/// A small layer's training on two ranks; what a rank's error says.
fn refused(run: impl Fn(&FsepRuntime) -> Result<(), FsepError> + Sync) -> Vec<String> {
    let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(10));
    let results = launch(&config, |comm| run(&FsepRuntime::new(comm)?));
    results.into_iter().map(|result| result.unwrap_err().to_string()).collect()
}

fn layer(runtime: &FsepRuntime, device: &Device) -> FSEPMoE {
    FSEPMoEConfig::new(4, 6, 4).init(runtime, device)
}

#[test]
fn a_loss_that_trains_nothing_is_refused_on_all_ranks() {
    let step = |runtime: &FsepRuntime, device: Device| {
        let x = Tensor::<2>::ones([3, 4], &device);
        let mut trainer = TrainerConfig::new().init(runtime, layer(runtime, &device), AdamWConfig::new().init())?;
        trainer.step(1e-3, |layer| layer.forward(x.clone()).mean().inner()).map(drop)
    };
    for error in refused(|runtime| step(runtime, device().autodiff())) {
        assert!(error.contains("depends on no parameter"), "{error}");
    }
}

#[test]
fn a_loss_of_several_numbers_is_refused() {
    for error in refused(|runtime| {
        let device = device().autodiff();
        let x = Tensor::<2>::ones([3, 4], &device);
        let mut trainer = TrainerConfig::new().init(runtime, layer(runtime, &device), AdamWConfig::new().init())?;
        trainer.step(1e-3, |layer| layer.forward(x.clone()).reshape([12])).map(drop)
    }) {
        assert!(error.contains("loss: expected [1]"), "{error}");
    }
}

#[test]
fn ranks_that_train_with_other_options_are_told_which() {
    let with = |change: fn(TrainerConfig) -> TrainerConfig| {
        refused(move |runtime| {
            let base = TrainerConfig::new().with_accumulation_steps(4).with_max_grad_norm(1.0);
            let config = if runtime.rank() == 1 { change(base) } else { base };
            let layer = layer(runtime, &device().autodiff());
            config.init(runtime, layer, AdamWConfig::new().init()).map(drop)
        })
    };
    for (field, errors) in [
        ("accumulation", with(|config| config.with_accumulation(Accumulation::Sum))),
        ("accumulation_steps", with(|config| config.with_accumulation_steps(2))),
        ("max_grad_norm", with(|config| config.with_max_grad_norm(2.0))),
        ("check_gradients", with(|config| config.with_check_gradients(false))),
        ("planner", with(|config| config.with_planner(PlannerConfig::new(PlannerStrategy::MinMax)))),
    ] {
        for error in errors {
            assert!(error.contains(&format!("ranks 0 and 1 differ in `{field}`")), "{error}");
        }
    }
}

#[test]
fn a_runtime_has_one_planner_at_a_time() {
    let runtime = FsepRuntime::single();
    let device = device().autodiff();
    let config = TrainerConfig::new().with_planner(PlannerConfig::new(PlannerStrategy::MinMax));
    let init = || config.init(&runtime, layer(&runtime, &device), AdamWConfig::new().init());
    drop(init().unwrap());
    let _second = init().unwrap();
    let error = init().err().expect("the second one lives").to_string();
    assert!(error.contains("has a planner"), "{error}");
}
