use burn::{
    optim::GradientsParams,
    tensor::Device,
    train::{
        EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent, LearnerModel,
        SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingError,
        TrainingItem, ValidLoader, train::WorkerFailure,
    },
};
use parking_lot::Mutex;

use super::{checkpoints::LearnerCheckpoints, optimizer::LearnerOptimizer};
use crate::{
    FsepError, FsepRuntime,
    checkpoint::{CheckpointConfig, TrainingProgress},
    comm::{Operation, all_gather_u64},
    train::{
        Accumulation, GradientBuckets, GradientStep, OptimizerContext, ShardedOptimizer, StepContext, TrainerConfig,
        TrainingCallback, gather_records, records_of_group,
    },
};

const BEGIN: Operation = Operation::new("checkpointers of burn-train");
const GO_ON: Operation = Operation::new("agreement to go on");

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
/// Batches that burn-train's `grads_accumulation` puts together make an optimizer step by their gradients' mean
/// ([`with_accumulation`](Self::with_accumulation)). An epoch that ends with fewer makes a step of those. Training that is stopped among
/// them makes none: what is saved and resumed begins before the first of them. The learning rate moves once an optimizer step.
///
/// burn-train's own checkpointers are for one rank: they would save one rank's part of the experts, or several into one
/// file. Checkpoints of [`with_checkpoints`](Self::with_checkpoints) are of all ranks, for any number of ranks.
///
/// Use it with `TrainingStrategy::Custom(Arc::new(strategy))`. If training fails, `LearningResult::error` says why and
/// [`FsepStrategy::error`] gives the typed error.
pub struct FsepStrategy {
    runtime: FsepRuntime,
    device: Device,
    config: TrainerConfig,
    callbacks: Mutex<Vec<Box<dyn TrainingCallback>>>,
    optimizer: LearnerOptimizer,
    error: Mutex<Option<FsepError>>,
}

impl FsepStrategy {
    /// A strategy that trains on `device`; gradients are tracked whether or not the device already does so.
    pub fn new(runtime: FsepRuntime, device: Device) -> Self {
        Self {
            runtime,
            device: device.autodiff(),
            config: TrainerConfig::new(),
            callbacks: Mutex::default(),
            optimizer: LearnerOptimizer::default(),
            error: Mutex::default(),
        }
    }

    /// As [`TrainerConfig::with_max_grad_norm`]. A norm that is not finite ends training on all ranks.
    pub fn with_max_grad_norm(mut self, max_norm: f64) -> Self {
        self.config = self.config.with_max_grad_norm(max_norm);
        self
    }

    /// As [`TrainerConfig::with_check_gradients`]. Gradients that are not finite end training on all ranks.
    pub fn with_check_gradients(mut self, check: bool) -> Self {
        self.config = self.config.with_check_gradients(check);
        self
    }

    /// As [`TrainerConfig::with_gradient_buckets`].
    pub fn with_gradient_buckets(mut self, buckets: GradientBuckets) -> Self {
        self.config = self.config.with_gradient_buckets(buckets);
        self
    }

    /// As [`TrainerConfig::with_accumulation`]: how the batches of burn-train's `grads_accumulation` make an optimizer step.
    pub fn with_accumulation(mut self, accumulation: Accumulation) -> Self {
        self.config = self.config.with_accumulation(accumulation);
        self
    }

    /// As [`TrainerConfig::with_check_replicas_every`]. Replicas that differ end training on all ranks.
    pub fn with_check_replicas_every(mut self, steps: Option<u64>) -> Self {
        self.config = self.config.with_check_replicas_every(steps);
        self
    }

    /// Saves checkpoints of model, optimizer, scheduler and progress: after every so many optimizer steps if the
    /// configuration says so, at the end of each epoch, and when training is stopped. Training ends with an error if one
    /// cannot be saved.
    pub fn with_checkpoints(mut self, config: CheckpointConfig) -> Self {
        self.config = self.config.with_checkpoints(config);
        self
    }

    /// Goes on from the progress of a checkpoint: batches of its epoch that are done are taken from the loader and left
    /// out. Model, optimizer and scheduler of the Learner have to be the checkpoint's, too.
    pub fn with_start(mut self, progress: TrainingProgress) -> Self {
        self.config = self.config.with_start(progress);
        self
    }

    /// Adds a callback, for example the planner's. All ranks add the same ones in the same order.
    pub fn with_callback(self, callback: impl TrainingCallback + 'static) -> Self {
        self.callbacks.lock().push(Box::new(callback));
        self
    }

    /// Steps with this optimizer, of whose state each rank keeps its part. The Learner's own, which nobody could cut, has to be a
    /// [`StrategyOptimizer`](super::StrategyOptimizer); learning rates are those of its scheduler.
    pub fn with_sharded_optimizer(mut self, optimizer: ShardedOptimizer) -> Self {
        self.optimizer = LearnerOptimizer::sharded(optimizer);
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

    /// What all ranks do next: the next batch, if all have one and none was stopped.
    ///
    /// # Errors
    ///
    /// The error that stopped this rank's Learner, if one did (data that cannot be read, metrics that cannot be written):
    /// without it the other ranks would take it for a stop and call their training a success.
    fn agree(&self, interrupter: &Interrupter, has_batch: bool) -> Result<Next, FsepError> {
        if let Some(error) = interrupter.error() {
            return Err(FsepError::Learner(error.to_string()));
        }
        let ours = [u64::from(interrupter.should_stop()), u64::from(!has_batch)];
        let all = all_gather_u64(self.runtime.comm(), GO_ON, &ours)?;
        let any = |what: usize| all.iter().skip(what).step_by(ours.len()).any(|&flag| flag == 1);
        Ok(if any(0) {
            if !interrupter.should_stop() {
                interrupter.stop(Some("another rank was stopped"));
            }
            Next::Stopped
        } else if any(1) {
            Next::EndOfData
        } else {
            Next::Batch
        })
    }

    /// Refuses burn-train's checkpointers where ranks would overwrite or miss each other's shards. Collective.
    fn check_burn_checkpointers(&self, has_checkpointers: bool) -> Result<(), FsepError> {
        let all = all_gather_u64(self.runtime.comm(), BEGIN, &[u64::from(has_checkpointers)])?;
        match all.iter().position(|&flag| flag == 1) {
            Some(rank) if all.len() > 1 => Err(FsepError::Config(format!(
                "rank {rank} has burn-train's own checkpointers, which know of one rank alone, but each of the {} ranks has its \
                 own part of the experts to save: use FsepStrategy::with_checkpoints",
                all.len()
            ))),
            _ => Ok(()),
        }
    }

    fn each_callback(
        &self,
        mut call: impl FnMut(&mut dyn TrainingCallback) -> Result<(), FsepError>,
    ) -> Result<(), FsepError> {
        for callback in self.callbacks.lock().iter_mut() {
            call(callback.as_mut())?;
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
        gather_records(&self.runtime, &mut checkpoints.progress.records, |records| {
            self.each_callback(|callback| callback.on_checkpoint(records))
        })?;
        self.optimizer.save(checkpoints, learner)
    }

    /// An optimizer step of the batches up to the epoch's `iteration`.
    fn optimize<M: LearnerModel>(
        &self,
        checkpoints: &mut LearnerCheckpoints,
        learner: &mut Learner<M>,
        gradients: &mut GradientStep<M>,
        mut grads: GradientsParams,
        iteration: usize,
    ) -> Result<(), FsepError> {
        let step = checkpoints.progress.step + 1;
        let gradient_norm = gradients.reduce(&learner.model(), &mut grads, step)?;
        learner.lr_step();
        self.optimizer.step(&self.runtime, learner, grads)?;
        (checkpoints.progress.step, checkpoints.progress.iteration) = (step, iteration as u64);
        let context = OptimizerContext::new(step, gradient_norm, &self.runtime);
        self.each_callback(|callback| callback.on_optimizer_step(&context))
    }

    fn train_epoch<M: LearnerModel>(
        &self,
        checkpoints: &mut LearnerCheckpoints,
        learner: &mut Learner<M>,
        gradients: &mut GradientStep<M>,
        loader: &TrainLoader<M>,
        events: &mut SupervisedTrainingEventProcessor<M>,
        interrupter: &Interrupter,
    ) -> Result<(), FsepError> {
        let mut batches = loader.iter();
        let makes_checkpoints = self.config.checkpoints.is_some();
        let epoch = checkpoints.progress.epoch as usize;
        let mut iteration = checkpoints.progress.iteration as usize;
        for _ in 0..iteration {
            // Done before the checkpoint that training goes on from.
            if self.next_batch(batches.next(), interrupter).is_none() {
                break;
            }
        }
        loop {
            let batch = self.next_batch(batches.next(), interrupter);
            let next = self.agree(interrupter, batch.is_some())?;
            let (Next::Batch, Some(batch)) = (next, batch) else {
                // Only here is it known which batch is the last that all ranks have.
                match (next, gradients.is_in_window()) {
                    (Next::EndOfData, _) => {
                        if let Some(grads) = gradients.end_window(&learner.model()) {
                            self.optimize(checkpoints, learner, gradients, grads, iteration)?;
                        }
                    }
                    (_, true) => {
                        gradients.discard_window()?;
                        if makes_checkpoints {
                            self.each_callback(|callback| callback.on_window_discarded(&self.runtime))?;
                        }
                    }
                    _ => {}
                }
                break;
            };
            if makes_checkpoints && gradients.begins_window() {
                self.each_callback(|callback| callback.on_window_start(&self.runtime))?;
            }
            iteration += 1;
            gradients.begin(&learner.model())?;
            let output = self.runtime.run(|| learner.train_step(batch))?;
            let progress = batches.progress();
            if let Some(grads) = gradients.add(&learner.model(), output.grads) {
                self.optimize(checkpoints, learner, gradients, grads, iteration)?;
            }
            self.each_callback(|callback| callback.on_step_end(&StepContext::new(epoch, iteration, &self.runtime)))?;
            if !gradients.is_in_window() && checkpoints.is_due() {
                self.save(checkpoints, learner)?;
            } else {
                checkpoints.poll()?;
            }
            let item = TrainingItem::new(output.item, progress, Some(iteration), Some(learner.lr_current()));
            interrupter.fail_on_error(events.process_train(LearnerEvent::ProcessedItem(item)));
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
            let (Next::Batch, Some(batch)) = (self.agree(interrupter, batch.is_some())?, batch) else { break };
            iteration += 1;
            let output = self.runtime.run(|| InferenceStep::step(&model, batch))?;
            let item = TrainingItem::new(output, batches.progress(), Some(iteration), None);
            interrupter.fail_on_error(events.process_valid(LearnerEvent::ProcessedItem(item)));
        }
        Ok(())
    }

    /// A batch; an error of the data loader stops the Learner, which [`Self::agree`] tells the other ranks.
    fn next_batch<I, E: Into<TrainingError>>(
        &self,
        batch: Option<Result<I, E>>,
        interrupter: &Interrupter,
    ) -> Option<I> {
        batch.and_then(|batch| batch.map_err(|error| interrupter.fail(error)).ok())
    }
}

/// What all ranks do next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Batch,
    /// Some rank has no more data.
    EndOfData,
    /// Some rank was stopped.
    Stopped,
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
            let start = &self.config.start;
            let mut progress = start.clone();
            if progress.epoch < starting_epoch as u64 {
                progress = progress.with_epoch(starting_epoch as u64, 0);
            }
            let mut burn_checkpoints = components.checkpointer;
            self.check_burn_checkpointers(burn_checkpoints.is_some())?;
            let accumulation_steps = components.grad_accumulation.unwrap_or(1).max(1);
            let config = self.config.clone().with_accumulation_steps(accumulation_steps);
            let mut gradients = GradientStep::new(&self.runtime, &config, self.optimizer.held())?;
            self.optimizer.check(&learner, burn_checkpoints.is_some())?;
            let event_store = components.event_store.clone();
            let mut checkpoints =
                LearnerCheckpoints::new(config.checkpoints.as_ref(), &self.runtime, progress, event_store)?;
            if start.step > 0 {
                let records = records_of_group(&self.runtime, &start.records);
                self.each_callback(|callback| callback.on_resume(&records))?;
            }
            self.each_callback(|callback| callback.on_train_start(&self.runtime))?;
            for epoch in checkpoints.progress.epoch as usize..=components.num_epochs {
                let split = |total_items| LearnerEvent::StartSplit { epoch_number: epoch, total_items };
                interrupter.fail_on_error(events.process_train(split(train.num_items())));
                self.train_epoch(&mut checkpoints, &mut learner, &mut gradients, &train, &mut events, &interrupter)?;
                interrupter.fail_on_error(events.process_train(LearnerEvent::EndSplit(epoch)));
                // Agreed on: a rank that is interrupted only now must not leave the others alone in validation.
                if self.agree(&interrupter, true)? != Next::Batch {
                    break;
                }
                let split = |total_items| LearnerEvent::StartSplit { epoch_number: epoch, total_items };
                interrupter.fail_on_error(events.process_valid(split(valid.num_items())));
                self.valid_epoch(&learner, &valid, &mut events, &interrupter)?;
                interrupter.fail_on_error(events.process_valid(LearnerEvent::EndSplit(epoch)));
                interrupter.fail_on_error(events.process_train(LearnerEvent::EndEpoch(epoch)));
                interrupter.fail_on_error(events.flush());
                if let Some(checkpointer) = &mut burn_checkpoints {
                    checkpointer.checkpoint(&learner, epoch, &components.event_store);
                }
                let stops_early = early_stopping
                    .as_mut()
                    .is_some_and(|strategy| strategy.should_stop(epoch, &components.event_store));
                checkpoints.progress = checkpoints.progress.clone().with_epoch(epoch as u64 + 1, 0);
                self.save(&mut checkpoints, &learner)?;
                if self.agree(&interrupter, !stops_early)? != Next::Batch {
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
