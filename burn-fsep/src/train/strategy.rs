use burn::{
    optim::{GradientsAccumulator, GradientsParams},
    tensor::Device,
    train::{
        EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent, LearnerModel,
        SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingError,
        TrainingItem, ValidLoader, train::WorkerFailure,
    },
};
use burn_fsep_planner::callback::{CallbackError, OptimizerContext, StepContext, TrainingCallback};
use parking_lot::Mutex;

use super::{
    GradientBuckets, burn_checkpoints::BurnCheckpoints, clip_grad_norm, learner_checkpoints::LearnerCheckpoints,
    sync_gradients,
};
use crate::{
    FsepError, FsepRuntime,
    checkpoint::{CheckpointConfig, TrainingProgress},
    comm::{Operation, ReduceBuffer, ReduceOp},
};

/// The training strategy of one rank for burn-train's Learner.
///
/// Every rank runs the same program with a Learner of its own. For each batch: forward and backward, dense gradients
/// averaged over ranks, gradients clipped by their global norm, optimizer step, callbacks. Ranks agree before each
/// batch whether to go on, so that no rank waits for one that was interrupted or has run out of data.
///
/// The Learner's metrics are those of the rank's own part of each batch: they differ between ranks and are averaged
/// nowhere. Early stopping looks at them, so ranks may come to different decisions; the first rank that wants to stop stops
/// all, at the end of the same epoch. To leave it to one rank's metrics, give early stopping to that rank alone.
///
/// burn-train's own checkpointers work if every rank has them, with a folder of its own; ranks that share one are found
/// out when they first save. They go on only with as many ranks, while checkpoints of
/// [`with_checkpoints`](Self::with_checkpoints) are for any number.
///
/// Use it with `TrainingStrategy::Custom(Arc::new(strategy))`. If training fails, `LearningResult::error` says why and
/// [`FsepStrategy::error`] gives the typed error.
pub struct FsepStrategy {
    runtime: FsepRuntime,
    device: Device,
    max_grad_norm: Option<f64>,
    buckets: Option<GradientBuckets>,
    checkpoints: Option<CheckpointConfig>,
    start: TrainingProgress,
    callbacks: Mutex<Vec<Box<dyn TrainingCallback>>>,
    error: Mutex<Option<FsepError>>,
}

impl FsepStrategy {
    /// A strategy that trains on `device`; gradients are tracked whether or not the device already does so.
    pub fn new(runtime: FsepRuntime, device: Device) -> Self {
        Self {
            runtime,
            device: device.autodiff(),
            max_grad_norm: None,
            buckets: None,
            checkpoints: None,
            start: TrainingProgress::default(),
            callbacks: Mutex::default(),
            error: Mutex::default(),
        }
    }

    /// Clips gradients by their global norm; see [`clip_grad_norm`]. A norm that is not finite ends training on all ranks with
    /// [`FsepError::GradientNorm`], before the optimizer sees the gradients; `f64::INFINITY` clips nothing and only checks.
    pub fn with_max_grad_norm(mut self, max_norm: f64) -> Self {
        self.max_grad_norm = Some(max_norm);
        self
    }

    /// Averages dense gradients in these buckets, for which the model prepares its blocks; see [`GradientBuckets`].
    pub fn with_gradient_buckets(mut self, buckets: GradientBuckets) -> Self {
        self.buckets = Some(buckets);
        self
    }

    /// Saves checkpoints of model, optimizer, scheduler and progress: after every so many optimizer steps if the
    /// configuration says so, at the end of each epoch, and when training is stopped. Training ends with an error if one
    /// cannot be saved.
    ///
    /// They are apart from burn-train's own checkpointers, of which each rank has its own.
    pub fn with_checkpoints(mut self, config: CheckpointConfig) -> Self {
        self.checkpoints = Some(config);
        self
    }

    /// Goes on from the progress of a checkpoint: batches of its epoch that are done are taken from the loader and left
    /// out. Model, optimizer and scheduler of the Learner have to be the checkpoint's, too.
    pub fn with_start(mut self, progress: TrainingProgress) -> Self {
        self.start = progress;
        self
    }

    /// Adds a callback, for example the planner's. All ranks add the same ones in the same order.
    pub fn with_callback(self, callback: impl TrainingCallback + 'static) -> Self {
        self.callbacks.lock().push(Box::new(callback));
        self
    }

    /// The error that ended the last training, if one did.
    pub fn error(&self) -> Option<FsepError> {
        self.error.lock().clone()
    }

    fn fail(&self, interrupter: &Interrupter, error: FsepError) {
        // Peers that wait for this rank learn why it does not come.
        self.runtime.comm().abort(&error.to_string());
        let failure = WorkerFailure { device_id: self.runtime.rank(), message: error.to_string() };
        self.error.lock().get_or_insert(error);
        interrupter.fail(TrainingError::Workers(vec![failure]));
    }

    /// Whether all ranks have a next batch and none was stopped.
    ///
    /// # Errors
    ///
    /// The error that stopped this rank's Learner, if one did (data that cannot be read, metrics that cannot be written):
    /// without it the other ranks would take it for a stop and call their training a success.
    fn agree_to_go_on(&self, interrupter: &Interrupter, has_batch: bool) -> Result<bool, FsepError> {
        if let Some(error) = interrupter.error() {
            return Err(FsepError::Learner(error.to_string()));
        }
        let mut stops = [f32::from(u8::from(interrupter.should_stop())), f32::from(u8::from(!has_batch))];
        let operation = Operation::new("agreement to go on");
        self.runtime.comm().all_reduce(operation, ReduceBuffer::F32(&mut stops), ReduceOp::Max)?;
        if stops[0] > 0.0 && !interrupter.should_stop() {
            interrupter.stop(Some("another rank was stopped"));
        }
        Ok(stops == [0.0, 0.0])
    }

    fn each_callback(
        &self,
        mut call: impl FnMut(&mut dyn TrainingCallback) -> Result<(), CallbackError>,
    ) -> Result<(), FsepError> {
        for callback in self.callbacks.lock().iter_mut() {
            call(callback.as_mut()).map_err(callback_error)?;
        }
        Ok(())
    }

    /// Saves a checkpoint, unless the newest one is of this step.
    fn save<M: LearnerModel>(
        &self,
        checkpoints: &mut LearnerCheckpoints,
        learner: &Learner<M>,
    ) -> Result<(), FsepError> {
        if checkpoints.is_saved() {
            return Ok(());
        }
        if self.runtime.rank() == 0 {
            self.each_callback(|callback| callback.on_checkpoint(&mut checkpoints.progress.records))?;
        }
        checkpoints.save(learner)
    }

    /// An optimizer step.
    fn optimize<M: LearnerModel>(
        &self,
        checkpoints: &mut LearnerCheckpoints,
        learner: &mut Learner<M>,
        mut grads: GradientsParams,
    ) -> Result<(), FsepError> {
        let step = checkpoints.progress.step + 1;
        let model = learner.model();
        match &self.buckets {
            Some(buckets) => buckets.sync(&model, &mut grads)?,
            None => sync_gradients(&self.runtime, &model, &mut grads)?,
        }
        let mut gradient_norm = None;
        if let Some(max_norm) = self.max_grad_norm {
            let norm = clip_grad_norm(&self.runtime, &model, &mut grads, max_norm)?;
            if !norm.is_finite() {
                return Err(FsepError::GradientNorm { step, norm });
            }
            gradient_norm = Some(norm);
        }
        drop(model);
        learner.lr_step();
        self.runtime.run(|| learner.optimizer_step(grads))?;
        checkpoints.progress.step = step;
        let context = OptimizerContext::new(step, gradient_norm, &self.runtime);
        self.each_callback(|callback| callback.on_optimizer_step(&context))
    }

    fn train_epoch<M: LearnerModel>(
        &self,
        checkpoints: &mut LearnerCheckpoints,
        learner: &mut Learner<M>,
        loader: &TrainLoader<M>,
        accumulation: Option<usize>,
        events: &mut SupervisedTrainingEventProcessor<M>,
        interrupter: &Interrupter,
    ) -> Result<(), FsepError> {
        let mut batches = loader.iter();
        let mut accumulator = GradientsAccumulator::new();
        let accumulation = accumulation.unwrap_or(1).max(1);
        let epoch = checkpoints.progress.epoch as usize;
        let (mut iteration, mut accumulated) = (checkpoints.progress.iteration as usize, 0);
        for _ in 0..iteration {
            // Done before the checkpoint that training goes on from.
            if self.next_batch(batches.next(), interrupter).is_none() {
                break;
            }
        }
        loop {
            let batch = self.next_batch(batches.next(), interrupter);
            if !self.agree_to_go_on(interrupter, batch.is_some())? {
                break;
            }
            let Some(batch) = batch else { break };
            iteration += 1;
            self.runtime.begin_step(&learner.model())?;
            if let (true, Some(buckets)) = (accumulation > 1, &self.buckets) {
                buckets.pause();
            }
            let output = self.runtime.run(|| learner.train_step(batch))?;
            self.runtime.end_step();
            let progress = batches.progress();
            if accumulation == 1 {
                self.optimize(checkpoints, learner, output.grads)?;
            } else {
                accumulator.accumulate(&learner.model(), output.grads);
                accumulated += 1;
                if accumulated == accumulation {
                    self.optimize(checkpoints, learner, accumulator.grads())?;
                    accumulated = 0;
                }
            }
            checkpoints.progress.iteration = iteration as u64;
            self.each_callback(|callback| callback.on_step_end(&StepContext::new(epoch, iteration, &self.runtime)))?;
            if accumulated == 0 && checkpoints.is_due() {
                self.save(checkpoints, learner)?;
            } else {
                checkpoints.poll()?;
            }
            let item = TrainingItem::new(output.item, progress, Some(iteration), Some(learner.lr_current()));
            interrupter.fail_on_error(events.process_train(LearnerEvent::ProcessedItem(item)));
        }
        // The last batches, fewer than accumulate. Not inside the loop: a rank's own loader does not know which batch is
        // the last that all ranks have.
        if accumulated > 0 {
            self.optimize(checkpoints, learner, accumulator.grads())?;
        }
        Ok(())
    }

    fn valid_epoch<M: LearnerModel>(
        &self,
        learner: &Learner<M>,
        loader: &ValidLoader<M>,
        events: &mut SupervisedTrainingEventProcessor<M>,
        interrupter: &Interrupter,
    ) -> Result<(), FsepError> {
        let model = learner.model().valid();
        let mut batches = loader.iter();
        let mut iteration = 0;
        loop {
            let batch = self.next_batch(batches.next(), interrupter);
            if !self.agree_to_go_on(interrupter, batch.is_some())? {
                break;
            }
            let Some(batch) = batch else { break };
            iteration += 1;
            let output = self.runtime.run(|| InferenceStep::step(&model, batch))?;
            let item = TrainingItem::new(output, batches.progress(), Some(iteration), None);
            interrupter.fail_on_error(events.process_valid(LearnerEvent::ProcessedItem(item)));
        }
        Ok(())
    }

    /// A batch; an error of the data loader stops the Learner, which [`Self::agree_to_go_on`] tells the other ranks.
    fn next_batch<I, E: Into<TrainingError>>(
        &self,
        batch: Option<Result<I, E>>,
        interrupter: &Interrupter,
    ) -> Option<I> {
        batch.and_then(|batch| batch.map_err(|error| interrupter.fail(error)).ok())
    }
}

fn callback_error(error: CallbackError) -> FsepError {
    match error {
        CallbackError::Planner(error) => error.into(),
        CallbackError::Host(error) => match error.downcast::<FsepError>() {
            Ok(error) => *error,
            Err(error) => FsepError::Callback(error.to_string()),
        },
        other => FsepError::Callback(other.to_string()),
    }
}

impl<M: LearnerModel> SupervisedLearningStrategy<M> for FsepStrategy {
    fn fit(
        &self,
        components: TrainingComponents<M>,
        mut learner: Learner<M>,
        train: TrainLoader<M>,
        valid: ValidLoader<M>,
        starting_epoch: usize,
    ) -> (M, SupervisedTrainingEventProcessor<M>) {
        let train = train.to_device(&self.device);
        let valid = valid.to_device(&self.device.clone().inner());
        // A graph of its own: rank threads that share one would wait for each other's backward.
        learner.fork(&self.device);
        let mut events = components.event_processor;
        let mut early_stopping = components.early_stopping;
        let interrupter = components.interrupter;

        *self.error.lock() = None;
        let run = || -> Result<(), FsepError> {
            let mut progress = self.start.clone();
            if progress.epoch < starting_epoch as u64 {
                progress = progress.with_epoch(starting_epoch as u64, 0);
            }
            let (config, event_store) = (self.checkpoints.as_ref(), components.event_store.clone());
            let loaded = components.checkpoint;
            let mut burn_checkpoints =
                BurnCheckpoints::new(&self.runtime, components.checkpointer, loaded, &learner.model())?;
            let mut checkpoints = LearnerCheckpoints::new(config, &self.runtime, progress, event_store)?;
            if self.start.step > 0 {
                self.each_callback(|callback| callback.on_resume(&self.start.records))?;
            }
            self.each_callback(|callback| callback.on_train_start(&self.runtime))?;
            for epoch in checkpoints.progress.epoch as usize..=components.num_epochs {
                let split = |total_items| LearnerEvent::StartSplit { epoch_number: epoch, total_items };
                interrupter.fail_on_error(events.process_train(split(train.num_items())));
                let accumulation = components.grad_accumulation;
                self.train_epoch(&mut checkpoints, &mut learner, &train, accumulation, &mut events, &interrupter)?;
                interrupter.fail_on_error(events.process_train(LearnerEvent::EndSplit(epoch)));
                // Agreed on: a rank that is interrupted only now must not leave the others alone in validation.
                if !self.agree_to_go_on(&interrupter, true)? {
                    break;
                }
                let split = |total_items| LearnerEvent::StartSplit { epoch_number: epoch, total_items };
                interrupter.fail_on_error(events.process_valid(split(valid.num_items())));
                self.valid_epoch(&learner, &valid, &mut events, &interrupter)?;
                interrupter.fail_on_error(events.process_valid(LearnerEvent::EndSplit(epoch)));
                interrupter.fail_on_error(events.process_train(LearnerEvent::EndEpoch(epoch)));
                interrupter.fail_on_error(events.flush());
                burn_checkpoints.save(&self.runtime, &learner, epoch, &components.event_store)?;
                let stops_early = early_stopping
                    .as_mut()
                    .is_some_and(|strategy| strategy.should_stop(epoch, &components.event_store));
                checkpoints.progress = checkpoints.progress.clone().with_epoch(epoch as u64 + 1, 0);
                self.save(&mut checkpoints, &learner)?;
                if !self.agree_to_go_on(&interrupter, !stops_early)? {
                    break;
                }
            }
            // Where training was stopped in an epoch; elsewhere it is there already.
            self.save(&mut checkpoints, &learner)?;
            checkpoints.finish()?;
            self.each_callback(|callback| callback.on_train_end(&self.runtime))
        };
        let result = run();
        if let Err(error) = result {
            self.fail(&interrupter, error);
        }
        (learner.model(), events)
    }
}
