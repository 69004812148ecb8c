//! Training through burn-train's Learner.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use burn::{
    data::{
        dataloader::DataLoaderBuilder,
        dataset::{Dataset, DatasetError, InMemDataset},
    },
    optim::AdamWConfig,
    train::{
        EarlyStoppingStrategy, Interrupter, Learner, SupervisedTraining, TrainingStrategy,
        metric::{LossMetric, store::EventStoreClient},
    },
};
use burn_fsep::{
    FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::local::LaunchConfig,
    learner::{
        FsepStrategy, ImbalanceMetric, ImbalanceP95Metric, MovedSlotsMetric, SilentRenderer, StaticImbalanceMetric,
    },
    train::{GradientBucketsConfig, OptimizerContext, PlannerConfig, RankDataset, StepContext, TrainingCallback},
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{
    GradientSync, HandTraining, LayoutSource, SmallMoe, TaskBatch, TaskBatcher, TaskItem, device, launch, plain_device,
    task_items, train_by_hand,
};

const SEED: u64 = 3;
const BATCH: usize = 16;
const CLIP: f64 = 0.5;

/// Counts the steps in which a layout changed.
struct CountLayouts {
    last: Option<Arc<burn_fsep_planner::Layout>>,
    changes: Arc<AtomicUsize>,
}

impl TrainingCallback for CountLayouts {
    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        let layout = context.runtime.layout(0);
        if self.last.as_ref().is_some_and(|last| *last != layout) {
            self.changes.fetch_add(1, Ordering::Relaxed);
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
        let buckets = GradientBucketsConfig::new().with_bucket_bytes(300).init(&runtime);
        let model = SmallMoe::fsep(&runtime, 3, &device())?.with_buckets(buckets.clone());
        let loader = |items: &[TaskItem]| -> Result<_, FsepError> {
            let part = RankDataset::new(InMemDataset::new(items.to_vec()), BATCH, &runtime)?;
            let size = part.batch_size();
            Ok(DataLoaderBuilder::<TaskItem, TaskBatch>::new(TaskBatcher).batch_size(size).build(part))
        };
        let changes = Arc::new(AtomicUsize::new(0));
        let planner = PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true).init();
        let report = planner.report();
        let strategy = Arc::new(
            FsepStrategy::new(runtime.clone(), plain_device())
                .with_max_grad_norm(CLIP)
                .with_gradient_buckets(buckets)
                .with_callback(planner)
                .with_callback(CountLayouts { last: None, changes: changes.clone() }),
        );
        let artifacts = folder.path().join(format!("rank-{}", runtime.rank()));
        let result = SupervisedTraining::new(artifacts, loader(&items)?, loader(&items[..4 * BATCH])?)
            .metrics((
                LossMetric::new(),
                ImbalanceMetric::new(),
                StaticImbalanceMetric::new(),
                ImbalanceP95Metric::new(),
                MovedSlotsMetric::new(),
            ))
            .num_epochs(2)
            .with_application_logger(None)
            .renderer(Box::new(SilentRenderer))
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
            .launch(Learner::new(model, AdamWConfig::new().with_epsilon(1e-6).init(), 1e-2));
        assert!(result.error.is_none(), "{:?}", result.error);
        assert!(strategy.error().is_none());
        let changes = changes.load(Ordering::Relaxed);
        Ok::<_, FsepError>((result.model.replicated(), changes, report.adopted(), runtime.stats()))
    });
    let results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    // A loop of one's own over the same batches, twice: the same bits.
    let layouts = LayoutSource::Planner(PlannerStrategy::MinMax);
    let training = HandTraining { steps: 80, batch: BATCH, clip: CLIP, layouts, sync: GradientSync::AfterBackward };
    let by_hand = launch(&LaunchConfig::new(4), |comm| {
        train_by_hand(&FsepRuntimeConfig::new().with_seed(SEED).init(comm)?, &items, &training)
    });
    assert_eq!(results[0].0, by_hand[0].as_ref().unwrap().replicated, "the Learner trains as a loop by hand does");
    for (replicated, changes, adopted, stats) in &results {
        assert_eq!(replicated, &results[0].0, "replicated parameters differ between ranks");
        // A layout that is good enough stays.
        assert!(*changes >= 3 && *adopted >= 3, "layouts changed {changes} times");
        assert_eq!(stats.layers.len(), 2);
        assert!(stats.imbalance() >= 1.0 && stats.imbalance() < stats.imbalance_static());
    }
    // burn-train writes one file a metric and epoch, a line a batch and one for the epoch.
    for rank in 0..4 {
        for epoch in [1, 2] {
            let folder = folder.path().join(format!("rank-{rank}/train/epoch-{epoch}"));
            let metric = |name: &str| read_metric(&folder, name, 40);
            let (before, after) = (metric("Expert imbalance (static EP)"), metric("Expert imbalance"));
            assert!(before.iter().chain(&after).all(|&x| (1.0..=4.0).contains(&x)), "{before:?} {after:?}");
            assert!(after.iter().sum::<f64>() < before.iter().sum::<f64>(), "planning helps");
            assert!(metric("Expert imbalance (p95 of layers)").iter().zip(&after).all(|(p95, mean)| p95 >= mean));
            assert!(metric("Moved slots").iter().any(|&n| n > 0.0));
            assert!(metric("Loss").iter().all(|&loss| loss > 0.0));
        }
    }
}

/// The values of a metric, which are `count`.
fn read_metric(folder: &Path, name: &str, count: usize) -> Vec<f64> {
    let file = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_stem().is_some_and(|stem| stem.to_string_lossy().replace('_', " ") == name))
        .unwrap_or_else(|| panic!("no {name} in {}", folder.display()));
    let text = std::fs::read_to_string(file).unwrap();
    let batches = text.lines().filter(|line| !line.ends_with(",final"));
    let values: Vec<f64> = batches.map(|line| line.split(',').next().unwrap().parse().unwrap()).collect();
    assert_eq!(values.len(), count, "{name}");
    values
}

/// A callback that fails on one rank.
struct FailOnce(usize);

impl TrainingCallback for FailOnce {
    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        match context.iteration == 2 && self.0 == 1 {
            true => Err(FsepError::Callback("no more luck".into())),
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
            Arc::new(FsepStrategy::new(runtime.clone(), plain_device()).with_callback(FailOnce(runtime.rank())));
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

/// Items of which one cannot be read.
struct Torn(Vec<TaskItem>, Option<usize>);

impl Dataset<TaskItem> for Torn {
    fn get(&self, index: usize) -> Result<TaskItem, DatasetError> {
        match self.1 == Some(index) {
            true => Err(DatasetError::new(std::io::Error::other("torn page"))),
            false => Ok(self.0[index].clone()),
        }
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

#[test]
fn data_that_one_rank_cannot_read_is_an_error_on_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let items = task_items(8 * BATCH, 1);
    for in_validation in [false, true] {
        let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(10)), |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let model = SmallMoe::fsep(&runtime, 4, &device())?;
            let loader = |is_validation: bool| -> Result<_, FsepError> {
                // In the fourth batch, where rank 1 has the second half.
                let torn = (runtime.rank() == 1 && is_validation == in_validation).then_some(4 * BATCH - 1);
                let part = RankDataset::new(Torn(items.clone(), torn), BATCH, &runtime)?;
                let size = part.batch_size();
                Ok(DataLoaderBuilder::<TaskItem, TaskBatch>::new(TaskBatcher).batch_size(size).build(part))
            };
            let strategy = Arc::new(FsepStrategy::new(runtime.clone(), plain_device()));
            let artifacts = folder.path().join(format!("{in_validation}-rank-{}", runtime.rank()));
            let result = SupervisedTraining::new(artifacts, loader(false)?, loader(true)?)
                .metrics((LossMetric::new(),))
                .with_application_logger(None)
                .renderer(Box::new(SilentRenderer))
                .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
                .launch(Learner::new(model, AdamWConfig::new().init(), 1e-2));
            assert!(result.error.is_some(), "rank {} does not know that training failed", runtime.rank());
            Ok::<_, FsepError>(strategy.error().expect("a typed error").to_string())
        });
        let errors: Vec<String> = results.into_iter().map(|result| result.unwrap_or_else(|e| panic!("{e}"))).collect();
        assert!(errors.iter().all(|error| error.contains("torn page")), "{errors:?}");
        assert!(errors[0].contains("rank 1"), "{errors:?}");
    }
}

/// Stops rank 1's Learner, and no other, in its third step.
struct StopOne(usize, Interrupter);

impl TrainingCallback for StopOne {
    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        if self.0 == 1 && context.iteration == 3 {
            self.1.stop(Some("enough"));
        }
        Ok(())
    }
}

/// What a callback is told.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    /// The batch in its epoch.
    Batch(usize),
    /// The optimizer step, and whether it knows the gradients' norm.
    Optimizer(u64, bool),
}

/// Remembers what it is told.
struct Record(Arc<Mutex<Vec<Event>>>);

impl TrainingCallback for Record {
    fn on_optimizer_step(&mut self, context: &OptimizerContext<'_>) -> Result<(), FsepError> {
        let norm = context.gradient_norm.filter(|norm| norm.is_finite() && *norm > 0.0);
        self.0.lock().unwrap().push(Event::Optimizer(context.step, norm.is_some()));
        Ok(())
    }

    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        self.0.lock().unwrap().push(Event::Batch(context.iteration));
        Ok(())
    }
}

/// Wants to stop after an epoch.
#[derive(Clone)]
struct StopAfter(Option<usize>);

impl EarlyStoppingStrategy for StopAfter {
    fn should_stop(&mut self, epoch: usize, _: &EventStoreClient) -> bool {
        self.0 == Some(epoch)
    }
}

/// A training of 2 ranks.
#[derive(Clone)]
struct ShortTraining {
    /// Batches of each rank.
    batches: [usize; 2],
    epochs: usize,
    /// Whether rank 1's interrupter is told to stop in the third step.
    stop: bool,
    /// The epoch after which rank 1 alone wants to stop early.
    stop_early: Option<usize>,
    accumulation: Option<usize>,
    max_grad_norm: Option<f64>,
    /// The batch whose gradients are not finite on rank 1, from 1.
    overflow: Option<usize>,
}

/// What a rank has at the end.
#[derive(Debug)]
struct ShortResult {
    events: Vec<Event>,
    replicated: Vec<f32>,
    error: Option<FsepError>,
}

impl ShortResult {
    fn batches(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, Event::Batch(_))).count()
    }
}

impl ShortTraining {
    fn new(batches: [usize; 2]) -> Self {
        let (stop_early, accumulation, max_grad_norm, overflow) = (None, None, None, None);
        Self { batches, epochs: 1, stop: false, stop_early, accumulation, max_grad_norm, overflow }
    }

    /// Both ranks' results, without errors.
    fn run(&self) -> Vec<ShortResult> {
        let results = self.try_run();
        results.iter().for_each(|result| assert_eq!(result.error, None));
        results
    }

    fn try_run(&self) -> Vec<ShortResult> {
        let folder = tempfile::tempdir().unwrap();
        let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(10));
        let results =
            launch(&config, |comm| self.run_rank(&FsepRuntimeConfig::new().with_seed(SEED).init(comm)?, folder.path()));
        results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
    }

    fn run_rank(&self, runtime: &FsepRuntime, folder: &Path) -> Result<ShortResult, FsepError> {
        let is_last = runtime.rank() == 1;
        let mut model = SmallMoe::fsep(runtime, 4, &device())?;
        let mut items = task_items(self.batches[runtime.rank()] * BATCH, 1);
        let valid_items = items.clone();
        if let (true, Some(batch)) = (is_last, self.overflow) {
            // Finite up to the last router, so that nothing but the gradients tells.
            items[batch * BATCH - 1].fill(1e12);
        }
        let loader = |items: &[TaskItem]| -> Result<_, FsepError> {
            let part = RankDataset::new(InMemDataset::new(items.to_vec()), BATCH, runtime)?;
            let size = part.batch_size();
            Ok(DataLoaderBuilder::<TaskItem, TaskBatch>::new(TaskBatcher).batch_size(size).build(part))
        };
        let (interrupter, events) = (Interrupter::new(), Arc::<Mutex<Vec<Event>>>::default());
        let mut strategy = FsepStrategy::new(runtime.clone(), plain_device()).with_callback(Record(events.clone()));
        if self.stop {
            strategy = strategy.with_callback(StopOne(runtime.rank(), interrupter.clone()));
        }
        if let Some(max_norm) = self.max_grad_norm {
            strategy = strategy.with_max_grad_norm(max_norm);
        }
        if self.accumulation.is_some() {
            let buckets = GradientBucketsConfig::new().with_bucket_bytes(1).init(runtime);
            model = model.with_buckets(buckets.clone());
            strategy = strategy.with_gradient_buckets(buckets);
        }
        let strategy = Arc::new(strategy);
        let artifacts = folder.join(format!("rank-{}", runtime.rank()));
        let mut training = SupervisedTraining::new(artifacts, loader(&items)?, loader(&valid_items)?)
            .metrics((LossMetric::new(),))
            .num_epochs(self.epochs)
            .early_stopping(StopAfter(self.stop_early.filter(|_| is_last)))
            .with_interrupter(interrupter)
            .with_application_logger(None)
            .renderer(Box::new(SilentRenderer))
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()));
        if let Some(accumulation) = self.accumulation {
            training = training.grads_accumulation(accumulation);
        }
        let result = training.launch(Learner::new(model, AdamWConfig::new().init(), 1e-2));
        let error = strategy.error();
        assert_eq!(result.error.is_some(), error.is_some(), "{:?}", result.error);
        let events = events.lock().unwrap().clone();
        Ok(ShortResult { events, replicated: result.model.replicated(), error })
    }
}

/// Checks that both ranks made `batches` steps and ended with the same parameters, which it returns.
fn same_on_both(results: Vec<ShortResult>, batches: usize) -> Vec<f32> {
    assert_eq!([results[0].batches(), results[1].batches()], [batches; 2]);
    assert_eq!(results[0].events, results[1].events);
    assert_eq!(results[0].replicated, results[1].replicated);
    results.into_iter().next().unwrap().replicated
}

#[test]
fn a_rank_that_is_stopped_stops_all() {
    same_on_both(ShortTraining { stop: true, ..ShortTraining::new([8, 8]) }.run(), 3);
}

#[test]
fn a_rank_that_stops_early_stops_all() {
    let training = ShortTraining { epochs: 4, stop_early: Some(2), ..ShortTraining::new([3, 3]) };
    same_on_both(training.run(), 6);
    same_on_both(ShortTraining { stop_early: None, ..training }.run(), 12);
}

#[test]
fn ranks_with_less_data_end_the_epoch_for_all() {
    same_on_both(ShortTraining::new([8, 5]).run(), 5);
}

#[test]
fn ranks_with_less_data_end_the_epoch_for_all_while_gradients_accumulate() {
    let of = |batches| ShortTraining { accumulation: Some(3), ..ShortTraining::new(batches) };
    let five = same_on_both(of([8, 5]).run(), 5);
    // What is left of the last batches counts: the fourth and fifth make a step of their own.
    assert_ne!(five, same_on_both(of([3, 3]).run(), 3));
}

#[test]
fn accumulated_gradients_make_fewer_steps() {
    let every = same_on_both(ShortTraining::new([8, 8]).run(), 8);
    let third = same_on_both(ShortTraining { accumulation: Some(3), ..ShortTraining::new([8, 8]) }.run(), 8);
    assert_ne!(every, third, "accumulation does something");
}

#[test]
fn callbacks_are_told_of_each_batch_and_of_each_optimizer_step() {
    use Event::{Batch, Optimizer};
    let plain = ShortTraining { epochs: 2, ..ShortTraining::new([2, 2]) };
    let expected = [(1, 1), (2, 2), (3, 1), (4, 2)].map(|(step, batch)| [Optimizer(step, true), Batch(batch)]);
    assert_eq!(plain.run()[0].events, expected.concat());
    let accumulated =
        ShortTraining { accumulation: Some(2), max_grad_norm: Some(0.5), epochs: 2, ..ShortTraining::new([3, 3]) };
    let epoch = |step| [Batch(1), Optimizer(step, true), Batch(2), Batch(3), Optimizer(step + 1, true)];
    assert_eq!(accumulated.run()[1].events, [epoch(1), epoch(3)].concat());
}

#[test]
fn a_gradient_norm_that_is_not_finite_ends_training_on_all_ranks() {
    for (max_grad_norm, accumulation, steps) in
        [(None, None, 2), (Some(0.5), None, 2), (Some(0.5), Some(2), 1), (Some(0.5), Some(5), 0)]
    {
        let training = ShortTraining { max_grad_norm, accumulation, ..ShortTraining::new([4, 4]) };
        for result in (ShortTraining { overflow: Some(3), ..training.clone() }).try_run() {
            let Some(FsepError::GradientNorm { step, norm }) = result.error else { panic!("{:?}", result.error) };
            assert!(!norm.is_finite());
            assert_eq!(step, steps + 1);
            let done = result.events.iter().filter(|event| matches!(event, Event::Optimizer(..))).count();
            assert_eq!(done as u64, steps);
            assert!(result.replicated.iter().all(|value| value.is_finite()), "the optimizer has seen it");
        }
    }
}
