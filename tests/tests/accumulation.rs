//! Gradient accumulation, and replicas that differ, on a model of one parameter whose training is known by hand.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use burn::{
    data::{
        dataloader::{DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    lr_scheduler::{LrScheduler, LrSchedulerRecord, module_lr_scheduler::ModuleLrScheduler},
    module::{Module, Param},
    optim::{LearningRate, SgdConfig},
    tensor::{Device, Tensor, TensorData},
    train::{
        InferenceStep, Interrupter, ItemLazy, Learner, SupervisedTraining, TrainOutput, TrainStep, TrainingStrategy,
        metric::{Adaptor, LossInput, LossMetric},
    },
};
use burn_fsep::{
    FsepError, FsepRuntime,
    checkpoint::{self, CheckpointConfig, list, verify},
    comm::local::LaunchConfig,
    learner::{FsepStrategy, SilentRenderer},
    train::{Accumulation, OptimizerContext, StepContext, TrainerConfig, TrainingCallback, check_replicas},
};
use burn_fsep_tests::{device, launch, plain_device};

const LR: f64 = 0.1;

/// Two numbers. The loss is half the squared distance to a target in each, so the gradient is their distance.
#[derive(Module, Debug)]
struct Point {
    w: Param<Tensor<1>>,
}

impl Point {
    fn new(values: [f32; 2]) -> Self {
        let value = Tensor::from_data(values, &device());
        Self { w: Param::from_tensor(value) }
    }

    /// The mean over targets.
    fn loss(&self, targets: &[f32]) -> Tensor<1> {
        let rows = targets.len();
        let targets = TensorData::new(targets.iter().flat_map(|&t| [t, t]).collect::<Vec<f32>>(), [rows, 2]);
        let targets = Tensor::<2>::from_data(targets, &self.w.device());
        let distance = self.w.val().unsqueeze::<2>().repeat_dim(0, rows) - targets;
        (distance.square() * 0.5).sum() / rows as f64
    }

    fn values(&self) -> [f32; 2] {
        self.w.val().into_data().try_to_vec::<f32>().unwrap().try_into().unwrap()
    }
}

struct PointOutput(Tensor<1>);

impl ItemLazy for PointOutput {
    fn sync(self) -> Result<Self, burn::tensor::ExecutionError> {
        Ok(self)
    }
}

impl Adaptor<LossInput> for PointOutput {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.0.clone())
    }
}

impl TrainStep for Point {
    type Input = Vec<f32>;
    type Output = PointOutput;

    fn step(&self, targets: Vec<f32>) -> TrainOutput<PointOutput> {
        let loss = self.loss(&targets);
        TrainOutput::new(self, loss.backward(), PointOutput(loss.inner()))
    }
}

impl InferenceStep for Point {
    type Input = Vec<f32>;
    type Output = PointOutput;

    fn step(&self, targets: Vec<f32>) -> PointOutput {
        PointOutput(self.loss(&targets))
    }
}

#[derive(Clone)]
struct Targets;

impl Batcher<f32, Vec<f32>> for Targets {
    fn batch(&self, items: Vec<f32>, _: &Device) -> Vec<f32> {
        items
    }
}

/// A constant learning rate that counts how often it is asked for.
#[derive(Clone)]
struct Counted(Arc<AtomicUsize>);

impl LrScheduler for Counted {
    fn step(&mut self) -> LearningRate {
        self.0.fetch_add(1, Ordering::Relaxed);
        LR
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new()
    }

    fn load_record(&mut self, _: LrSchedulerRecord) {}
}

/// Counts optimizer steps, and stops its rank's Learner after a batch.
struct Watch {
    steps: Arc<AtomicUsize>,
    stop: Option<usize>,
    interrupter: Interrupter,
}

impl TrainingCallback for Watch {
    fn on_optimizer_step(&mut self, _: &OptimizerContext<'_>) -> Result<(), FsepError> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        if self.stop == Some(context.iteration) {
            self.interrupter.stop(Some("enough"));
        }
        Ok(())
    }
}

/// A training of an epoch of one target a batch, the same on all ranks.
#[derive(Clone)]
struct Job<'a> {
    targets: Vec<f32>,
    accumulation: Accumulation,
    /// The batch after which rank 1 is stopped.
    stop: Option<usize>,
    checkpoints: Option<&'a Path>,
    resume: bool,
    /// What each rank begins with.
    initial: [[f32; 2]; 2],
}

/// What a rank has at the end.
#[derive(Debug, PartialEq)]
struct Ended {
    values: [f32; 2],
    steps: usize,
    lr_steps: usize,
}

impl Job<'_> {
    fn new(targets: usize, accumulation: Accumulation) -> Self {
        let targets = (0..targets).map(|i| 2.0 * i as f32).collect();
        Self { targets, accumulation, stop: None, checkpoints: None, resume: false, initial: [[1.0, 2.0]; 2] }
    }

    /// Both ranks' ends, which are equal.
    fn run(&self) -> Ended {
        let mut ends = self.try_run().into_iter().map(|end| end.unwrap_or_else(|error| panic!("{error}")));
        let first = ends.next().unwrap();
        ends.for_each(|end| assert_eq!(end, first));
        first
    }

    fn try_run(&self) -> Vec<Result<Ended, FsepError>> {
        let folder = tempfile::tempdir().unwrap();
        let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(20));
        let results = launch(&config, |comm| self.run_rank(&FsepRuntime::new(comm)?, folder.path()));
        results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
    }

    fn run_rank(&self, runtime: &FsepRuntime, folder: &Path) -> Result<Result<Ended, FsepError>, FsepError> {
        let (steps, lr_steps, interrupter) = (Arc::default(), Arc::default(), Interrupter::new());
        let stop = self.stop.filter(|_| runtime.rank() == 1);
        let watch = Watch { steps: Arc::clone(&steps), stop, interrupter: interrupter.clone() };
        let mut strategy = FsepStrategy::new(runtime.clone(), plain_device())
            .with_accumulation(self.accumulation)
            .with_callback(watch);
        let (mut model, mut optimizer) = (Point::new(self.initial[runtime.rank()]), SgdConfig::new().init());
        if let Some(folder) = self.checkpoints {
            strategy = strategy.with_checkpoints(CheckpointConfig::new(folder));
            if self.resume {
                let newest = list(folder)?.pop().expect("a checkpoint");
                let loaded = checkpoint::load(newest, runtime, &model, &optimizer)?;
                (model, optimizer) = (loaded.model, loaded.optimizer);
                strategy = strategy.with_start(loaded.progress);
            }
        }
        let strategy = Arc::new(strategy);
        let loader = |items: &[f32]| {
            DataLoaderBuilder::<f32, Vec<f32>>::new(Targets).batch_size(1).build(InMemDataset::new(items.to_vec()))
        };
        let artifacts = folder.join(format!("rank-{}", runtime.rank()));
        let result = SupervisedTraining::new(artifacts, loader(&self.targets), loader(&self.targets[..1]))
            .metrics((LossMetric::new(),))
            .num_epochs(1)
            .grads_accumulation(2)
            .with_interrupter(interrupter)
            .with_application_logger(None)
            .renderer(Box::new(SilentRenderer))
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
            .launch(Learner::new(model, optimizer, ModuleLrScheduler::new(Counted(Arc::clone(&lr_steps)))));
        Ok(match strategy.error() {
            Some(error) => Err(error),
            None => Ok(Ended {
                values: result.model.values(),
                steps: steps.load(Ordering::Relaxed),
                lr_steps: lr_steps.load(Ordering::Relaxed),
            }),
        })
    }
}

fn assert_near(actual: [f32; 2], expected: [f32; 2]) {
    let is_near = actual.iter().zip(expected).all(|(actual, expected)| (actual - expected).abs() < 1e-5);
    assert!(is_near, "{actual:?} instead of {expected:?}");
}

#[test]
fn an_epoch_that_ends_within_a_window_makes_a_step_of_it() {
    // By hand: w - 0.1 (2 w - 2), then w - 0.1 (2 w - 10), then w - 0.1 (w - 8). The mean: half of the first two steps.
    for (accumulation, expected) in [(Accumulation::Sum, [2.42, 2.996]), (Accumulation::Mean, [2.06, 2.789])] {
        let end = Job::new(5, accumulation).run();
        assert_near(end.values, expected);
        assert_eq!((end.steps, end.lr_steps), (3, 3));
    }
}

#[test]
fn a_stop_within_a_window_makes_no_step_of_it() {
    let end = Job { stop: Some(1), ..Job::new(5, Accumulation::Sum) }.run();
    assert_eq!(end, Ended { values: [1.0, 2.0], steps: 0, lr_steps: 0 });
}

#[test]
fn training_that_was_stopped_within_a_window_goes_on_from_its_start() {
    for (accumulation, expected) in [(Accumulation::Sum, 3.24), (Accumulation::Mean, 2.16)] {
        let job = Job::new(6, accumulation);
        let undisturbed = job.run().values;
        assert_near([undisturbed[0], 0.0], [expected, 0.0]);
        for stop in [1, 2, 3, 4, 5] {
            let folder = tempfile::tempdir().unwrap();
            let job = Job { checkpoints: Some(folder.path()), ..job.clone() };
            Job { stop: Some(stop), ..job.clone() }.run();
            let progress = verify(list(folder.path()).unwrap().pop().unwrap()).unwrap().progress;
            let steps = stop as u64 / 2;
            assert_eq!([progress.step, progress.epoch, progress.iteration], [steps, 1, 2 * steps]);
            assert_eq!(Job { resume: true, ..job }.run().values, undisturbed, "stopped after batch {stop}");
        }
    }
}

#[test]
fn the_learner_finds_replicas_that_were_never_broadcast() {
    let folder = tempfile::tempdir().unwrap();
    for checkpoints in [None, Some(folder.path())] {
        let job = Job { initial: [[1.0, 2.0], [5.0, 7.0]], checkpoints, ..Job::new(4, Accumulation::Mean) };
        for result in job.try_run() {
            let error = result.unwrap_err();
            let FsepError::ReplicasDiffer { parameter, ranks, .. } = &error else { panic!("{error}") };
            assert_eq!((parameter.as_str(), ranks.as_slice()), ("w", &[1][..]));
            assert!(error.to_string().contains("`w` has other values on rank 1 than on rank 0"), "{error}");
            assert!(error.to_string().contains("call `broadcast_parameters`"), "{error}");
        }
    }
}

/// Runs a program on ranks that have a runtime each.
fn ranks<T: Send>(count: usize, program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync) -> Vec<T> {
    let config = LaunchConfig::new(count).with_timeout(Duration::from_secs(20));
    let results = launch(&config, |comm| program(&FsepRuntime::new(comm)?));
    results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// Values after one window of four targets, in `windows` batches, and the norm of its gradients.
fn window(config: &TrainerConfig, batches: usize) -> Vec<([f32; 2], Option<f64>)> {
    // The mean distance to (1, 2) is (0.25, 1.25).
    let targets = [0.0f32, 0.5, 1.0, 1.5];
    ranks(2, |runtime| {
        let config = config.clone().with_accumulation_steps(batches);
        let mut trainer = config.init(runtime, Point::new([1.0, 2.0]), SgdConfig::new().init())?;
        let mut norm = None;
        for (i, targets) in targets.chunks(targets.len() / batches).enumerate() {
            let step = trainer.step(LR, |model| model.loss(targets))?;
            assert_eq!(step.optimizer_step, (i + 1 == batches).then_some(1));
            norm = step.gradient_norm;
        }
        Ok((trainer.finish()?.values(), norm))
    })
}

#[test]
fn four_micro_batches_train_as_one_batch_does() {
    let plain = TrainerConfig::new().with_max_grad_norm(f64::INFINITY);
    for (values, norm) in [window(&plain, 4), window(&plain, 2), window(&plain, 1)].concat() {
        assert_near(values, [0.975, 1.875]);
        assert!((norm.unwrap() - (0.25f64.powi(2) + 1.25f64.powi(2)).sqrt()).abs() < 1e-6, "{norm:?}");
    }
    for (values, _) in window(&plain.clone().with_accumulation(Accumulation::Sum), 4) {
        assert_near(values, [0.9, 1.5]);
    }
    // Clipping sees the mean: below its norm of 1.275 it bites in all three alike, and above it in none.
    let clipped = TrainerConfig::new().with_max_grad_norm(0.5);
    let expected = window(&clipped, 1)[0].0;
    assert!(expected[1] > 1.9, "{expected:?}");
    for (values, _) in [window(&clipped, 4), window(&clipped, 2)].concat() {
        assert_near(values, expected);
    }
    for (values, _) in window(&TrainerConfig::new().with_max_grad_norm(1.3), 4) {
        assert_near(values, [0.975, 1.875]);
    }
}

#[test]
fn the_trainer_ends_a_window_when_it_is_told_to() {
    for (accumulation, expected) in [(Accumulation::Sum, [2.42, 2.996]), (Accumulation::Mean, [2.06, 2.789])] {
        let config = TrainerConfig::new().with_accumulation_steps(2).with_accumulation(accumulation);
        let values = ranks(2, |runtime| {
            let mut trainer = config.init(runtime, Point::new([1.0, 2.0]), SgdConfig::new().init())?;
            assert_eq!(trainer.end_window(LR)?, None, "there is none yet");
            for target in [0.0, 2.0, 4.0, 6.0, 8.0] {
                trainer.step(LR, |model| model.loss(&[target]))?;
            }
            assert_eq!((trainer.progress().step, trainer.progress().iteration), (2, 4));
            assert!(matches!(trainer.save(), Err(FsepError::Config(_))), "in a window");
            assert_eq!(trainer.end_window(LR)?, Some(3));
            assert_eq!((trainer.progress().step, trainer.progress().iteration), (3, 5));
            trainer.step(LR, |model| model.loss(&[100.0]))?;
            trainer.discard_window()?;
            assert_eq!(trainer.end_window(LR)?, None);
            Ok(trainer.finish()?.values())
        });
        values.into_iter().for_each(|values| assert_near(values, expected));
    }
}

#[test]
fn the_trainer_begins_with_equal_replicas_and_finds_those_that_part() {
    let errors = ranks(3, |runtime| {
        let rank = runtime.rank() as f32;
        let mut trainer = TrainerConfig::new().init(runtime, Point::new([rank, rank]), SgdConfig::new().init())?;
        assert_eq!(trainer.model().values(), [0.0, 0.0], "rank 0's");
        // Ranks 1 and 2 train with another learning rate.
        let lr = LR + 0.1 * f64::from(rank);
        trainer.step(lr, |model| model.loss(&[1.0]))?;
        let result = trainer.step(lr, |model| model.loss(&[1.0]));
        Ok(result.map(|_| ()).unwrap_err())
    });
    for error in errors {
        let FsepError::ReplicasDiffer { parameter, ranks, hint } = &error else { panic!("{error}") };
        assert_eq!((parameter.as_str(), ranks.as_slice()), ("w", &[1, 2][..]));
        assert!(hint.contains("sync_gradients"), "{error}");
    }
}

#[test]
fn a_check_by_hand_names_the_first_parameter_that_differs() {
    #[derive(Module, Debug)]
    struct Pair {
        points: Vec<Point>,
    }
    let pair = |second: f32| Pair { points: vec![Point::new([1.0, 2.0]), Point::new([second, 4.0])] };
    let results = ranks(2, |runtime| {
        check_replicas(runtime, &pair(3.0))?;
        let differing = pair(f32::from_bits(3f32.to_bits() + runtime.rank() as u32));
        let named = check_replicas(runtime, &differing).unwrap_err();
        let mut other = pair(3.0);
        other.points.truncate(2 - runtime.rank());
        Ok((named.to_string(), check_replicas(runtime, &other).unwrap_err().to_string()))
    });
    for (differing, other) in results {
        assert!(differing.contains("`points.1.w` has other values on rank 1"), "{differing}");
        assert!(other.contains("rank 0 has 2 replicated parameters, rank 1 has 1"), "{other}");
    }
}
