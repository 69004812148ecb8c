//! Training equals that of the dense model: in a loop of one's own and through the Learner.

use std::{sync::Arc, time::Duration};

use burn::{
    data::{
        dataloader::{DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    optim::{AdamWConfig, GradientsParams},
    tensor::Device,
    train::{Learner, SupervisedTraining, TrainingStrategy, metric::LossMetric},
};
use burn_fsep::{
    FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::{
        Operation, ReduceBuffer, ReduceOp,
        local::{LaunchConfig, launch},
    },
    train::{
        FsepStrategy, ImbalanceMetric, LayerImbalanceMetric, MovedSlotsMetric, RankDataset, SilentRenderer,
        StaticImbalanceMetric, clip_grad_norm, sync_gradients,
    },
};
use burn_fsep_planner::{
    PlannerConfig, Strategy,
    callback::{CallbackError, StepContext, TrainingCallback},
};
use burn_fsep_tests::{SmallMoe, TaskBatch, TaskBatcher, TaskItem, dense_loss_curve, device, task_items};

const SEED: u64 = 3;
const BATCH: usize = 16;
const CLIP: f64 = 0.5;

/// A rank's losses and what it ended with.
struct Trained {
    losses: Vec<f32>,
    replicated: Vec<f32>,
    layouts: usize,
    largest_norm: f64,
}

/// Training without a strategy: the loop that the README shows.
fn train_by_hand(
    runtime: &FsepRuntime,
    items: &[TaskItem],
    steps: usize,
    strategy: Strategy,
) -> Result<Trained, FsepError> {
    let device = device();
    // The fewest slots that hold all 8 experts, and one more.
    let mut model = SmallMoe::fsep(runtime, 8 / runtime.world_size() + 1, &device)?;
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-6).init();
    let mut planner = PlannerConfig::new(strategy).with_synchronous(true).init();
    let share = BATCH / runtime.world_size();
    let mut trained = Trained { losses: vec![], replicated: vec![], layouts: 0, largest_norm: 0.0 };
    let mut layout = runtime.layout(0);
    planner.on_train_start(runtime).unwrap();
    for step in 0..steps {
        let start = step * BATCH + runtime.rank() * share;
        let batch = TaskBatcher.batch(items[start..start + share].to_vec(), &device);
        let (loss, mut grads) = runtime.run(|| {
            let loss = model.loss(&batch);
            let value = loss.clone().into_scalar::<f32>();
            (value, GradientsParams::from_grads(loss.backward(), &model))
        })?;
        sync_gradients(runtime, &model, &mut grads)?;
        let norm = clip_grad_norm(runtime, &model, &mut grads, CLIP)?;
        model = optimizer.step(1e-2, model, grads);
        planner.on_step_end(&StepContext::new(1, step + 1, runtime)).unwrap();

        let mut mean = [loss];
        runtime.comm().all_reduce(Operation::new("loss"), ReduceBuffer::F32(&mut mean), ReduceOp::Mean)?;
        trained.losses.push(mean[0]);
        trained.largest_norm = trained.largest_norm.max(norm);
        trained.layouts += usize::from(runtime.layout(0) != layout);
        layout = runtime.layout(0);
    }
    planner.on_train_end(runtime).unwrap();
    trained.replicated = model.replicated();
    Ok(trained)
}

#[test]
fn the_loss_curve_is_that_of_the_dense_model() {
    let steps = 200;
    let items = task_items(steps * BATCH, 1);
    let dense = dense_loss_curve(SEED, steps, BATCH, &items, CLIP);
    assert!(dense[steps - 1] < 0.7 * dense[0], "the model learns: {} to {}", dense[0], dense[steps - 1]);
    for (ranks, strategy) in [(2, Strategy::Paper), (4, Strategy::MinMax), (4, Strategy::Paper)] {
        let results = launch(&LaunchConfig::new(ranks), |comm| {
            let config = FsepRuntimeConfig::new().with_seed(SEED);
            let runtime = config.init(comm)?;
            train_by_hand(&runtime, &items, steps, strategy)
        });
        let results: Vec<Trained> = results.into_iter().map(Result::unwrap).collect();
        assert!(results[0].layouts >= 10, "{ranks} ranks, {strategy}: {} new layouts", results[0].layouts);
        assert!(results[0].largest_norm > CLIP, "clipping had nothing to do: {}", results[0].largest_norm);
        for result in &results {
            for (step, (ours, dense)) in result.losses.iter().zip(&dense).enumerate() {
                let error = (ours - dense).abs() / dense;
                assert!(error <= 1e-4, "{ranks} ranks, {strategy}, step {step}: {ours} against {dense}");
            }
            assert_eq!(result.replicated, results[0].replicated, "replicated parameters differ between ranks");
        }
    }
}

/// Counts the steps in which a layout changed.
struct CountLayouts {
    last: Option<Arc<burn_fsep_planner::Layout>>,
    changes: Arc<std::sync::atomic::AtomicUsize>,
}

impl TrainingCallback for CountLayouts {
    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), CallbackError> {
        let layout = context.host.layout(0);
        if self.last.as_ref().is_some_and(|last| *last != layout) {
            self.changes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        self.last = Some(layout);
        Ok(())
    }
}

#[test]
fn the_learner_trains_on_four_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let items = task_items(40 * BATCH, 1);
    let results = launch(&LaunchConfig::new(4).with_timeout(Duration::from_secs(20)), |comm| {
        let runtime = FsepRuntimeConfig::new().with_seed(SEED).init(comm)?;
        let model = SmallMoe::fsep(&runtime, 3, &device())?;
        let loader = |items: &[TaskItem]| -> Result<_, FsepError> {
            let part = RankDataset::new(InMemDataset::new(items.to_vec()), BATCH, &runtime)?;
            let size = part.batch_size();
            Ok(DataLoaderBuilder::<TaskItem, TaskBatch>::new(TaskBatcher).batch_size(size).build(part))
        };
        let changes = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let planner = PlannerConfig::new(Strategy::MinMax).with_synchronous(true).init();
        let report = planner.report();
        let strategy = Arc::new(
            FsepStrategy::new(runtime.clone(), Device::flex())
                .with_max_grad_norm(CLIP)
                .with_callback(planner)
                .with_callback(CountLayouts { last: None, changes: changes.clone() }),
        );
        let artifacts = folder.path().join(format!("rank-{}", runtime.rank()));
        let result = SupervisedTraining::new(artifacts, loader(&items)?, loader(&items[..4 * BATCH])?)
            .metrics((
                LossMetric::new(),
                ImbalanceMetric::new(),
                StaticImbalanceMetric::new(),
                LayerImbalanceMetric::new(),
                MovedSlotsMetric::new(),
            ))
            .num_epochs(2)
            .with_application_logger(None)
            .with_default_checkpointers()
            .renderer(Box::new(SilentRenderer))
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
            .launch(Learner::new(model, AdamWConfig::new().init(), 1e-2));
        assert!(result.error.is_none(), "{:?}", result.error);
        assert!(strategy.error().is_none());
        let changes = changes.load(std::sync::atomic::Ordering::Relaxed);
        Ok::<_, FsepError>((result.model.replicated(), changes, report.adopted(), runtime.stats()))
    });
    let results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    for (replicated, changes, adopted, stats) in &results {
        assert_eq!(replicated, &results[0].0, "replicated parameters differ between ranks");
        assert!(*changes >= 10 && *adopted >= 10, "layouts changed {changes} times");
        assert_eq!(stats.layers.len(), 2);
        assert!(stats.imbalance() >= 1.0 && stats.imbalance() < stats.imbalance_static());
    }
    // burn-train writes one file a metric and epoch.
    for metric in ["Expert_imbalance", "Loss", "Moved_slots"] {
        let written = walk(folder.path()).into_iter().any(|path| path.contains("rank-0") && path.contains(metric));
        assert!(written, "no {metric} among {:?}", walk(folder.path()));
    }
}

fn walk(folder: &std::path::Path) -> Vec<String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path.display().to_string().replace(' ', "_")) }
    }
    files
}

/// A callback that fails on one rank.
struct FailOnce(usize);

impl TrainingCallback for FailOnce {
    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), CallbackError> {
        match context.iteration == 2 && self.0 == 1 {
            true => Err(CallbackError::Host("no more luck".into())),
            false => Ok(()),
        }
    }
}

#[test]
fn an_error_in_the_learner_ends_training_on_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let items = task_items(8 * BATCH, 1);
    let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(10)), |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let model = SmallMoe::fsep(&runtime, 4, &device())?;
        let part = || RankDataset::new(InMemDataset::new(items.clone()), BATCH, &runtime);
        let loader = |part: RankDataset<_>| {
            DataLoaderBuilder::<TaskItem, TaskBatch>::new(TaskBatcher).batch_size(part.batch_size()).build(part)
        };
        let strategy =
            Arc::new(FsepStrategy::new(runtime.clone(), Device::flex()).with_callback(FailOnce(runtime.rank())));
        let artifacts = folder.path().join(format!("rank-{}", runtime.rank()));
        let result = SupervisedTraining::new(artifacts, loader(part()?), loader(part()?))
            .metrics((LossMetric::new(),))
            .with_application_logger(None)
            .renderer(Box::new(SilentRenderer))
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
            .launch(Learner::new(model, AdamWConfig::new().init(), 1e-2));
        assert!(result.error.is_some());
        Ok::<_, FsepError>(strategy.error().unwrap().to_string())
    });
    let errors: Vec<String> = results.into_iter().map(Result::unwrap).collect();
    assert!(errors[1].contains("no more luck"), "{errors:?}");
    assert!(errors[0].contains("rank 1") && errors[0].contains("no more luck"), "{errors:?}");
}
