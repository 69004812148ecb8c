//! Checkpoints of training through burn-train's Learner.

use std::{path::Path, sync::Arc, time::Duration};

use burn::{
    data::{dataloader::DataLoaderBuilder, dataset::InMemDataset},
    lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig,
    optim::AdamWConfig,
    train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy, logger::FileMetricLogger, metric::LossMetric},
};
use burn_fsep::{
    FsepError, FsepRuntime, FsepRuntimeConfig,
    checkpoint::{self, CheckpointConfig, CheckpointError, list, verify},
    comm::local::LaunchConfig,
    learner::{FsepStrategy, SilentRenderer, StrategyOptimizer},
    train::{PlannerConfig, RankDataset, ShardedOptimizer, StepContext, TrainingCallback},
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{
    SmallMoe, TaskBatch, TaskBatcher, TaskItem, device, launch, plain_device, small_slots, task_items,
};

const BATCH: usize = 16;
/// Batches of an epoch.
const BATCHES: usize = 10;

/// One training of two epochs.
#[derive(Clone)]
struct Job<'a> {
    ranks: usize,
    checkpoints: Option<CheckpointConfig>,
    /// The checkpoint to go on from.
    resume: Option<&'a Path>,
    accumulation: Option<usize>,
    /// Whether layouts are planned.
    plans: bool,
    /// Whether the optimizer's state is cut over ranks.
    sharded: bool,
    /// The batch after which rank 1 is stopped.
    stop: Option<usize>,
    /// Checkpoints of burn-train itself.
    burn: Option<BurnFolders<'a>>,
}

/// Where burn-train's checkpointers save, and the epoch that they go on from.
#[derive(Clone, Copy)]
struct BurnFolders<'a> {
    folder: &'a Path,
    /// The number of each rank's folder; a rank that has none has no checkpointers.
    of_ranks: &'a [usize],
    resume: Option<usize>,
}

impl Job<'_> {
    fn new(ranks: usize) -> Self {
        Self {
            ranks,
            checkpoints: None,
            resume: None,
            accumulation: None,
            plans: false,
            sharded: false,
            stop: None,
            burn: None,
        }
    }

    /// Each rank's parameters at the end, or the error of its strategy.
    fn run(&self) -> Vec<Result<Vec<f32>, FsepError>> {
        let folder = tempfile::tempdir().unwrap();
        let config = LaunchConfig::new(self.ranks).with_timeout(Duration::from_secs(20));
        let mut runtime_config = FsepRuntimeConfig::new().with_seed(3);
        if self.burn.is_some() {
            // Their checkpoints know nothing of layouts that were repaired, on which the order of sums depends.
            runtime_config = runtime_config.with_repair(None);
        }
        let results = launch(&config, |comm| self.run_rank(&runtime_config.init(comm)?, folder.path()));
        results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
    }

    fn run_rank(&self, runtime: &FsepRuntime, folder: &Path) -> Result<Result<Vec<f32>, FsepError>, FsepError> {
        let items = task_items(BATCHES * BATCH, 1);
        let loader = |items: &[TaskItem]| -> Result<_, FsepError> {
            let part = RankDataset::new(InMemDataset::new(items.to_vec()), BATCH, runtime)?;
            let size = part.batch_size();
            Ok(DataLoaderBuilder::<TaskItem, TaskBatch>::new(TaskBatcher).batch_size(size).build(part))
        };
        let mut model = SmallMoe::fsep(runtime, small_slots(self.ranks).min(8), &device())?;
        let mut optimizer = AdamWConfig::new().with_epsilon(1e-6).init();
        let scheduler = CosineAnnealingLrSchedulerConfig::new(1e-2, 2 * BATCHES).init();
        let mut scheduler = scheduler.map_err(FsepError::Config)?;
        let interrupter = Interrupter::new();
        let mut strategy = FsepStrategy::new(runtime.clone(), plain_device())
            .with_max_grad_norm(0.5)
            .with_callback(StopAfter(self.stop.filter(|_| runtime.rank() == 1), interrupter.clone()));
        if self.plans {
            let planner = PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true);
            strategy = strategy.with_callback(planner.init());
        }
        if let Some(config) = &self.checkpoints {
            strategy = strategy.with_checkpoints(config.clone());
        }
        if self.sharded {
            let mut sharded = ShardedOptimizer::new(runtime, optimizer, &model)?;
            if let Some(path) = self.resume {
                let loaded = checkpoint::load(path, runtime, &model, &sharded)?;
                (model, sharded) = (loaded.model, loaded.optimizer);
                scheduler = scheduler.load_record(loaded.progress.scheduler()?.expect("the Learner has one"));
                strategy = strategy.with_start(loaded.progress);
            }
            strategy = strategy.with_sharded_optimizer(sharded);
            optimizer = StrategyOptimizer.into();
        } else if let Some(path) = self.resume {
            let loaded = checkpoint::load(path, runtime, &model, &optimizer)?;
            (model, optimizer) = (loaded.model, loaded.optimizer);
            scheduler = scheduler.load_record(loaded.progress.scheduler()?.expect("the Learner has one"));
            strategy = strategy.with_start(loaded.progress);
        }
        let strategy = Arc::new(strategy);
        let number = self.burn.and_then(|burn| burn.of_ranks.get(runtime.rank()).copied());
        let artifacts = match (self.burn, number) {
            (Some(burn), Some(number)) => burn.folder.join(format!("folder-{number}")),
            _ => folder.join(format!("rank-{}", runtime.rank())),
        };
        // Each rank's own, also where folders are shared: ranks that write to one file may leave what burn-train cannot read.
        let logger = FileMetricLogger::new(artifacts.join(format!("metrics-{}", runtime.rank())));
        let mut training = SupervisedTraining::new(artifacts, loader(&items)?, loader(&items[..2 * BATCH])?)
            .with_metric_logger(logger)
            .metrics((LossMetric::new(),))
            .num_epochs(2)
            .with_interrupter(interrupter)
            .with_application_logger(None)
            .renderer(Box::new(SilentRenderer))
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()));
        if let Some(accumulation) = self.accumulation {
            training = training.grads_accumulation(accumulation);
        }
        if number.is_some() {
            training = training.with_default_checkpointers();
        }
        if let Some(epoch) = self.burn.and_then(|burn| burn.resume) {
            training = training.checkpoint(epoch);
        }
        let result = training.launch(Learner::new(model, optimizer, scheduler));
        assert_eq!(result.error.is_some(), strategy.error().is_some());
        Ok(match strategy.error() {
            Some(error) => Err(error),
            None => Ok(result.model.replicated()),
        })
    }

    fn run_all(&self) -> Vec<Vec<f32>> {
        self.run().into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
    }
}

struct StopAfter(Option<usize>, Interrupter);

impl TrainingCallback for StopAfter {
    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        if self.0 == Some(context.iteration) {
            self.1.stop(Some("enough"));
        }
        Ok(())
    }
}

/// Step, epoch and iteration of all checkpoints.
fn saved(folder: &Path) -> Vec<[u64; 3]> {
    let position = |path: &std::path::PathBuf| {
        let progress = verify(path).unwrap().progress;
        [progress.step, progress.epoch, progress.iteration]
    };
    list(folder).unwrap().iter().map(position).collect()
}

#[test]
fn the_learner_goes_on_from_any_checkpoint() {
    let undisturbed = Job::new(4).run_all();
    for background in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let config = CheckpointConfig::new(folder.path()).with_every(4).with_keep(100).with_background(background);
        let job = Job { checkpoints: Some(config), ..Job::new(4) };
        assert_eq!(job.run_all(), undisturbed, "saving changes nothing");
        let positions = [[4, 1, 4], [8, 1, 8], [10, 2, 0], [12, 2, 2], [16, 2, 6], [20, 2, 10]];
        assert_eq!(saved(folder.path()), positions);
        for path in list(folder.path()).unwrap() {
            let resumed = Job { resume: Some(&path), ..Job::new(4) };
            assert_eq!(resumed.run_all(), undisturbed, "bit for bit from {}", path.display());
        }
        let path = &list(folder.path()).unwrap()[1];
        for (ours, expected) in (Job { resume: Some(path), ..Job::new(2) }).run_all()[0].iter().zip(&undisturbed[0]) {
            assert!((ours - expected).abs() <= 1e-4, "on 2 ranks: {ours} instead of {expected}");
        }
    }
}

#[test]
fn a_training_that_is_stopped_saves_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let config = CheckpointConfig::new(folder.path());
    Job { checkpoints: Some(config), stop: Some(7), ..Job::new(2) }.run_all();
    assert_eq!(saved(folder.path()), [[7, 1, 7]]);
    let path = list(folder.path()).unwrap().pop().unwrap();
    assert_eq!(Job { resume: Some(&path), ..Job::new(2) }.run_all(), Job::new(2).run_all());
}

#[test]
fn checkpoints_lie_between_accumulated_batches() {
    let folder = tempfile::tempdir().unwrap();
    let config = CheckpointConfig::new(folder.path()).with_every(2).with_keep(100);
    let job = Job { accumulation: Some(3), ..Job::new(2) };
    let undisturbed = Job { checkpoints: Some(config), ..job.clone() }.run_all();
    // Of ten batches, the last one makes a step of its own.
    assert_eq!(saved(folder.path()), [[2, 1, 6], [4, 2, 0], [6, 2, 6], [8, 3, 0]]);
    let path = &list(folder.path()).unwrap()[0];
    assert_eq!(Job { resume: Some(path), ..job }.run_all(), undisturbed);
}

#[test]
fn a_training_that_is_stopped_between_accumulated_batches_goes_on_before_them() {
    // Whatever the planner has seen of them, and whatever layouts came of it.
    let job = Job { accumulation: Some(3), plans: true, ..Job::new(4) };
    let undisturbed = job.run_all();
    for (stop, every, expected) in [(1, None, [0, 1, 0]), (8, None, [2, 1, 6]), (8, Some(2), [2, 1, 6])] {
        let folder = tempfile::tempdir().unwrap();
        let config = CheckpointConfig { every, ..CheckpointConfig::new(folder.path()) };
        let stopped = Job { checkpoints: Some(config), stop: Some(stop), ..job.clone() };
        stopped.run_all();
        assert_eq!(saved(folder.path()), [expected], "stopped after batch {stop}");
        let path = list(folder.path()).unwrap().pop().unwrap();
        let resumed = Job { resume: Some(&path), ..job.clone() }.run_all();
        assert_eq!(resumed, undisturbed, "bit for bit, stopped after batch {stop}");
    }
}

#[test]
fn a_checkpoint_that_cannot_be_saved_ends_training_on_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "no folder").unwrap();
    for background in [false, true] {
        let config = CheckpointConfig::new(file.join("checkpoints")).with_every(3).with_background(background);
        let job = Job { checkpoints: Some(config), ..Job::new(2) };
        for (rank, result) in job.run().into_iter().enumerate() {
            let error = result.unwrap_err();
            let FsepError::Checkpoint(error) = error else { panic!("rank {rank}: {error}") };
            match rank {
                0 => assert!(matches!(error, CheckpointError::Io { .. }), "{error}"),
                _ => assert!(matches!(error, CheckpointError::Peer { rank: 0, .. }), "{error}"),
            }
        }
    }
}

/// The reason for which every rank refuses the job.
fn refusal(job: &Job) -> String {
    let mut reasons = job.run().into_iter().map(|result| match result {
        Err(FsepError::Config(reason)) => reason,
        other => panic!("{other:?}"),
    });
    let first = reasons.next().unwrap();
    assert!(reasons.all(|reason| reason == first));
    first
}

#[test]
fn burns_own_checkpointers_work_for_one_rank() {
    let folder = tempfile::tempdir().unwrap();
    let burn = BurnFolders { folder: folder.path(), of_ranks: &[0], resume: None };
    let undisturbed = Job { burn: Some(burn), ..Job::new(1) }.run_all();
    let resumed = Job { burn: Some(BurnFolders { resume: Some(1), ..burn }), ..Job::new(1) };
    assert_eq!(resumed.run_all(), undisturbed);
}

#[test]
fn burns_own_checkpointers_are_refused_for_several_ranks() {
    let folder = tempfile::tempdir().unwrap();
    // With a folder each, one for both, and on one rank alone.
    for of_ranks in [&[0, 1][..], &[0, 0], &[0]] {
        let burn = BurnFolders { folder: folder.path(), of_ranks, resume: None };
        let reason = refusal(&Job { burn: Some(burn), ..Job::new(2) });
        assert!(reason.contains("rank 0 has burn-train's own checkpointers"), "{reason}");
        assert!(reason.contains("FsepStrategy::with_checkpoints"), "{reason}");
    }
}

#[test]
fn a_learner_whose_optimizer_state_is_cut_makes_the_same_steps_and_checkpoints() {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let job = |sharded: bool| {
        let config = CheckpointConfig::new(folders[usize::from(sharded)].path()).with_keep(usize::MAX);
        Job { checkpoints: Some(config), sharded, plans: true, accumulation: Some(2), ..Job::new(4) }
    };
    let whole = job(false).run_all();
    assert_eq!(job(true).run_all(), whole);
    // From the end of the first epoch, cut and whole, on the same ranks bit for bit, and on others.
    for folder in &folders {
        let first = list(folder.path()).unwrap().swap_remove(0);
        for sharded in [false, true] {
            let job = Job { resume: Some(&first), checkpoints: None, ..job(sharded) };
            assert_eq!(job.run_all(), whole, "cut: {sharded}");
            let others = Job { ranks: 2, ..job }.run_all();
            for (ours, expected) in others[0].iter().zip(&whole[0]) {
                assert!((ours - expected).abs() <= 1e-4, "{ours} instead of {expected}");
            }
        }
    }
}

#[test]
fn a_learner_of_its_own_optimizer_is_refused_where_the_strategy_has_one() {
    let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(20));
    let folder = tempfile::tempdir().unwrap();
    let results = launch(&config, |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntimeConfig::new().with_seed(3).init(comm)?;
        let loader = || {
            let items = InMemDataset::new(task_items(BATCH, 1));
            DataLoaderBuilder::<TaskItem, TaskBatch>::new(TaskBatcher).batch_size(BATCH).build(items)
        };
        let (model, adamw) = (SmallMoe::fsep(&runtime, 5, &device())?, || AdamWConfig::new().init());
        let sharded = ShardedOptimizer::new(&runtime, adamw(), &model)?;
        let strategy = FsepStrategy::new(runtime.clone(), plain_device()).with_sharded_optimizer(sharded);
        let strategy = Arc::new(strategy);
        SupervisedTraining::new(folder.path().join(format!("rank-{}", runtime.rank())), loader(), loader())
            .metrics((LossMetric::new(),))
            .num_epochs(1)
            .with_application_logger(None)
            .renderer(Box::new(SilentRenderer))
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
            .launch(Learner::new(model, adamw(), 1e-2));
        Ok(strategy.error())
    });
    for result in results {
        let error = result.unwrap();
        assert!(matches!(&error, Some(FsepError::Config(reason)) if reason.contains("StrategyOptimizer")), "{error:?}");
    }
}
