use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use burn::{
    data::dataloader::DataLoaderBuilder,
    lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig,
    module::Module,
    tensor::Device,
    train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy, metric::LossMetric},
};
use burn_fsep::{
    FsepError, FsepRuntime, FsepRuntimeConfig, ScheduleConfig, Timeline,
    comm::{Communicator, Difference, Operation, ReduceBuffer, ReduceOp, agree, digest},
    launch::Rank,
    learner::{FsepStrategy, ImbalanceMetric, SilentRenderer, StaticImbalanceMetric},
    planner::PlannerStrategy,
    train::{
        FusedAdamWConfig, GradientBuckets, GradientBucketsConfig, PlannerConfig, RankDataset, broadcast_parameters,
    },
};

use crate::{
    Args, MoeLmError, Planner,
    data::{LmBatch, LmBatcher, Windows},
    generate::generate,
    model::MoeLm,
    record::{Recorder, StepRecorder, StepRow, TraceCounts},
    resume,
    timeline::TimelineWriter,
};

/// What all ranks train on.
pub(crate) struct TrainingData {
    pub train: Windows,
    pub valid: Windows,
    /// Checksum of the text.
    pub digest: String,
    /// What the generated sample continues.
    pub prompt: Vec<u8>,
}

/// What a rank has at the end; equal on all ranks.
pub(crate) struct Trained {
    pub rows: Vec<StepRow>,
    pub valid_loss: f64,
    pub seconds: f64,
    pub sample: Vec<u8>,
    /// Routing counts, if they were to be recorded; on the first rank.
    pub trace: TraceCounts,
}

/// The program of one rank. `None` if it was told to stop and saved a checkpoint.
pub(crate) fn train_rank(args: &Args, data: &TrainingData, rank: Rank) -> Result<Option<Trained>, MoeLmError> {
    check_equal(args, data, rank.comm.as_ref())?;
    if let Some(timeline) = &rank.timeline {
        timeline.set_recording(false);
    }
    let runtime = rank.runtime(runtime_config(args))?;
    train(args, data, runtime, rank.device, rank.timeline)
}

fn train(
    args: &Args,
    data: &TrainingData,
    runtime: FsepRuntime,
    device: Device,
    timeline: Option<Timeline>,
) -> Result<Option<Trained>, MoeLmError> {
    let Args { training, parallel, output, .. } = args;
    let losses = StepRecorder::default();
    let buckets = GradientBucketsConfig::new().with_compute_dtype(args.compute_dtype()).init(&runtime);
    let mut model = init_model(args, &runtime, &buckets, losses.clone(), &device.clone().autodiff())?;
    let mut optimizer = FusedAdamWConfig::new().with_beta_2(0.99).with_weight_decay(0.01).init();
    let mut lr = CosineAnnealingLrSchedulerConfig::new(training.lr, training.steps)
        .with_min_lr(training.lr / 10.0)
        .init()
        .map_err(MoeLmError::Option)?;
    let mut progress = resume::beginning(args, data);
    if let Some(loaded) = resume::resume(args, data, &runtime, &model, &optimizer)? {
        (model, optimizer, progress) = (loaded.model, loaded.optimizer, loaded.progress);
        if let Some(record) = progress.scheduler().map_err(FsepError::from)? {
            lr = lr.load_record(record);
        }
    }

    let folder = output.out.join(format!("rank-{}", runtime.rank()));
    std::fs::create_dir_all(&folder).map_err(MoeLmError::file(&folder))?;
    let planner = PlannerConfig::new(parallel.planner.strategy())
        .with_synchronous(parallel.ranks.synchronous)
        .with_seed(training.seed)
        .init();
    let metrics = output.out.join("metrics.jsonl");
    let tokens_per_step = training.tokens_per_step();
    let rows = if runtime.rank() == 0 { resume::rows_before(&metrics, progress.step)? } else { Vec::new() };
    let mut recorder =
        Recorder::new(&runtime, losses.clone(), planner.report(), tokens_per_step, training.steps, &metrics, rows)?;
    let rows = recorder.rows();
    let trace = (output.record_trace.is_some() && runtime.rank() == 0).then(|| recorder.record_trace());
    let done = progress.step;
    let mut strategy = FsepStrategy::new(runtime.clone(), device.clone())
        .with_max_grad_norm(training.clip)
        .with_gradient_buckets(buckets)
        .with_callback(planner)
        .with_callback(recorder)
        .with_start(progress);
    if let (Some(timeline), Some(file)) = (timeline, &output.timeline) {
        strategy = strategy.with_callback(TimelineWriter::new(timeline, file, runtime.rank(), done, training.steps));
    }
    let interrupter = Interrupter::new();
    if let Some(checkpoints) = resume::checkpoints(args) {
        strategy =
            strategy.with_checkpoints(checkpoints).with_callback(resume::StopOnSignal::new(interrupter.clone())?);
    }
    let strategy = Arc::new(strategy);

    let loader = |windows: &Windows| -> Result<_, FsepError> {
        let part = RankDataset::new(windows.clone(), training.batch, &runtime)?;
        let size = part.batch_size();
        Ok(DataLoaderBuilder::<Vec<u8>, LmBatch>::new(LmBatcher).batch_size(size).build(part))
    };
    let result = SupervisedTraining::new(folder, loader(&data.train)?, loader(&data.valid)?)
        .metrics((LossMetric::new(), ImbalanceMetric::new(), StaticImbalanceMetric::new()))
        .num_epochs(1)
        .with_interrupter(interrupter)
        .with_application_logger(None)
        .renderer(Box::new(SilentRenderer))
        .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
        .launch(Learner::new(model, optimizer, lr));
    if let Some(error) = strategy.error() {
        return Err(error.into());
    }
    if let Some(error) = result.error {
        return Err(MoeLmError::Training(error.to_string()));
    }
    if result.interrupted.is_some() {
        if runtime.rank() == 0 {
            eprintln!("stopped after a checkpoint; --resume auto goes on from it");
        }
        // Launchers may kill the others as soon as one has ended.
        runtime.comm().barrier(Operation::new("end of a stopped training")).map_err(FsepError::from)?;
        return Ok(None);
    }

    let sample = runtime
        .run(|| generate(&result.model, &data.prompt, output.sample, training.context, training.seed, &device))?;
    let mut valid_loss = [losses.mean_valid_loss()];
    runtime
        .comm()
        .all_reduce(Operation::new("validation loss"), ReduceBuffer::F64(&mut valid_loss), ReduceOp::Mean)
        .map_err(FsepError::from)?;
    let rows = take(&rows);
    let seconds: f64 = rows.iter().map(|row| tokens_per_step as f64 / row.tokens_per_second).sum();
    let trace = trace.map(|trace| take(&trace)).unwrap_or_default();
    Ok(Some(Trained { rows, valid_loss: valid_loss[0], seconds, sample, trace }))
}

fn runtime_config(args: &Args) -> FsepRuntimeConfig {
    let parallel = &args.parallel;
    // The paper dispatches as static expert parallelism does, and nothing is repaired in the step.
    let strategy = match parallel.planner {
        Planner::MinMax | Planner::Random => PlannerStrategy::MinMax,
        Planner::Paper | Planner::Static => PlannerStrategy::Paper,
    };
    let mut config = parallel.ranks.runtime_config().with_seed(args.training.seed).with_strategy(strategy);
    config.ranks_per_node = parallel.ranks_per_node;
    if parallel.no_prefetch {
        config.schedule = ScheduleConfig::off();
    }
    config
}

/// Ranks that are processes each have a command line and a text of their own; other ones would train, but not as one.
fn check_equal(args: &Args, data: &TrainingData, comm: &dyn Communicator) -> Result<(), MoeLmError> {
    let mut args = args.clone();
    // These may have other names on other machines, or concern one rank.
    args.parallel.ranks.ranks = None;
    args.parallel.ranks.device = rank_args::DeviceArg::Cpu;
    args.training.text.clear();
    args.output.out = PathBuf::new();
    (args.output.summary, args.output.record_trace, args.output.timeline) = (None, None, None);
    let fields = [
        ("other options or another build", digest(format!("{args:?}").as_bytes())),
        ("another text", digest(data.digest.as_bytes())),
    ];
    match agree(comm, Operation::new("options of the ranks"), &fields)? {
        Some(Difference { rank, field, .. }) => {
            Err(MoeLmError::Option(format!("ranks 0 and {rank} were started with {field}: give all the same")))
        }
        None => Ok(()),
    }
}

/// A model with the same values on all ranks and for any number of ranks.
///
/// Burn's generator belongs to the whole process, so the ranks draw one after the other; the first one's values count.
fn init_model(
    args: &Args,
    runtime: &FsepRuntime,
    buckets: &GradientBuckets,
    losses: StepRecorder,
    device: &Device,
) -> Result<MoeLm, FsepError> {
    let init = || -> Result<MoeLm, FsepError> {
        let model = MoeLm::new(args, runtime, buckets, losses.clone(), device)?;
        // Parameters are drawn when they are first looked at.
        model.num_params();
        let _ = model.clone().into_record();
        Ok(model)
    };
    let mut first = None;
    if runtime.rank() == 0 {
        device.seed(args.training.seed);
        first = Some(init()?);
    }
    runtime.comm().barrier(Operation::new("initial values"))?;
    let model = match first {
        Some(model) => model,
        None => init()?,
    };
    broadcast_parameters(runtime, model)
}

fn take<T: Default>(shared: &Mutex<T>) -> T {
    std::mem::take(&mut *shared.lock().unwrap_or_else(PoisonError::into_inner))
}
