use std::sync::{Arc, Mutex, PoisonError};

use burn::{
    data::dataloader::DataLoaderBuilder,
    lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig,
    module::Module,
    optim::AdamWConfig,
    tensor::Device,
    train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy, metric::LossMetric},
};
use burn_fsep::{
    FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::{Communicator, Operation, ReduceBuffer, ReduceOp},
    train::{FsepStrategy, ImbalanceMetric, RankDataset, SilentRenderer, StaticImbalanceMetric, broadcast_parameters},
};
use burn_fsep_planner::{PlannerConfig, Strategy};

use crate::{
    Args, MoeLmError, Planner,
    data::{LmBatch, LmBatcher, Windows},
    generate::generate,
    model::MoeLm,
    record::{Recorder, StepRecorder, StepRow, TraceCounts},
    resume,
};

/// What all ranks train on.
pub(crate) struct TrainingData {
    pub train: Windows,
    pub valid: Windows,
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

/// The program of one rank.
pub(crate) fn train_rank(args: &Args, data: &TrainingData, comm: Arc<dyn Communicator>) -> Result<Trained, MoeLmError> {
    let device = Device::flex();
    let mut config = FsepRuntimeConfig::new().with_seed(args.seed).with_dispatcher(match args.planner.strategy() {
        Strategy::MinMax => || Strategy::MinMax.dispatcher(),
        _ => || Strategy::Paper.dispatcher(),
    });
    config.ranks_per_node = args.ranks_per_node;
    if args.planner != Planner::MinMax {
        // As the paper has it: nothing is repaired in the step.
        config.correction = None;
    }
    let runtime = config.init(comm)?;
    let losses = StepRecorder::default();
    let mut model = init_model(args, &runtime, losses.clone(), &device.clone().autodiff())?;
    let mut optimizer = AdamWConfig::new().with_beta_2(0.99).with_weight_decay(0.01).init();
    let mut lr = CosineAnnealingLrSchedulerConfig::new(args.lr, args.steps)
        .with_min_lr(args.lr / 10.0)
        .init()
        .map_err(MoeLmError::Option)?;
    let mut progress = resume::beginning(args, data);
    if let Some(loaded) = resume::resume(args, data, &runtime, &model, &optimizer)? {
        (model, optimizer, progress) = (loaded.model, loaded.optimizer, loaded.progress);
        if let Some(record) = progress.scheduler().map_err(FsepError::from)? {
            lr = lr.load_record(record);
        }
    }

    let planner =
        PlannerConfig::new(args.planner.strategy()).with_synchronous(args.synchronous).with_seed(args.seed).init();
    let metrics = args.out.join("metrics.jsonl");
    let tokens_per_step = args.batch * args.context;
    let rows = if runtime.rank() == 0 { resume::rows_before(&metrics, progress.step)? } else { Vec::new() };
    let mut recorder =
        Recorder::new(runtime.clone(), losses.clone(), planner.report(), tokens_per_step, args.steps, &metrics, rows)?;
    let rows = recorder.rows();
    let trace = (args.record_trace.is_some() && runtime.rank() == 0).then(|| recorder.record_trace());
    let mut strategy = FsepStrategy::new(runtime.clone(), device.clone())
        .with_max_grad_norm(args.clip)
        .with_callback(planner)
        .with_callback(recorder)
        .with_start(progress);
    let interrupter = Interrupter::new();
    if let Some(checkpoints) = resume::checkpoints(args) {
        strategy =
            strategy.with_checkpoints(checkpoints).with_callback(resume::StopOnSignal::new(interrupter.clone())?);
    }
    let strategy = Arc::new(strategy);

    let loader = |windows: &Windows| -> Result<_, FsepError> {
        let part = RankDataset::new(windows.clone(), args.batch, &runtime)?;
        let size = part.batch_size();
        Ok(DataLoaderBuilder::<Vec<u8>, LmBatch>::new(LmBatcher).batch_size(size).build(part))
    };
    let result = SupervisedTraining::new(
        args.out.join(format!("rank-{}", runtime.rank())),
        loader(&data.train)?,
        loader(&data.valid)?,
    )
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
        return Err(MoeLmError::Ranks(error.to_string()));
    }
    if result.interrupted.is_some() {
        return Err(MoeLmError::Stopped);
    }

    let sample =
        runtime.run(|| generate(&result.model, &data.prompt, args.sample, args.context, args.seed, &device))?;
    let mut valid_loss = [losses.mean_valid_loss()];
    runtime
        .comm()
        .all_reduce(Operation::new("validation loss"), ReduceBuffer::F64(&mut valid_loss), ReduceOp::Mean)
        .map_err(FsepError::from)?;
    let rows = take(&rows);
    let seconds: f64 = rows.iter().map(|row| tokens_per_step as f64 / row.tokens_per_second).sum();
    let trace = trace.map(|trace| take(&trace)).unwrap_or_default();
    Ok(Trained { rows, valid_loss: valid_loss[0], seconds, sample, trace })
}

/// A model with the same values on all ranks and for any number of ranks.
///
/// Burn's generator belongs to the whole process, so the ranks draw one after the other; the first one's values count.
fn init_model(args: &Args, runtime: &FsepRuntime, losses: StepRecorder, device: &Device) -> Result<MoeLm, FsepError> {
    let init = || -> Result<MoeLm, FsepError> {
        let model = MoeLm::new(args, runtime, losses.clone(), device)?;
        // Parameters are drawn when they are first looked at.
        model.num_params();
        let _ = model.clone().into_record();
        Ok(model)
    };
    let mut first = None;
    if runtime.rank() == 0 {
        device.seed(args.seed);
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
