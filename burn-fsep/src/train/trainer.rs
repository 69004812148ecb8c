use burn::{
    lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    module::Module,
    optim::{GradientsParams, ModuleOptimizer},
    tensor::Tensor,
};

use super::{
    PlannerCallback, PlannerReport, TrainOptimizer, TrainerConfig, TrainingCallback, broadcast_parameters,
    gradients::GradientStep,
    group_records::{gather_records, records_of_group},
    sharded_optimizer::check_experts,
    update_expert_biases,
};
use crate::{
    FsepError, FsepRuntime,
    checkpoint::{Checkpoints, HeldState, TrainingProgress},
    comm::{Operation, ReduceBuffer, ReduceOp, all_gather_u64},
};

/// Trains a model, a whole step at a time, so that no part of a step can be forgotten. Made by [`TrainerConfig::init`].
///
/// A step is: the forward pass that the user gives, backward, with every layer connected to the loss; gradients accumulated if
/// that is wanted, averaged over ranks and clipped; the optimizer; the planner; checkpoints. All ranks make the same steps.
/// From time to time they check that their replicated parameters are equal.
///
/// ```
/// # use burn::{nn::LinearConfig, optim::AdamWConfig, tensor::{Device, Tensor}};
/// # use burn_fsep::{FsepRuntime, train::TrainerConfig};
/// # let device = Device::flex().autodiff();
/// # let runtime = FsepRuntime::single();
/// let model = LinearConfig::new(4, 4).init(&device);
/// let config = TrainerConfig::new().with_max_grad_norm(1.0);
/// let mut trainer = config.init(&runtime, model, AdamWConfig::new().init())?;
/// for _ in 0..3 {
///     let x = Tensor::<2>::ones([2, 4], &device);
///     let step = trainer.step(1e-3, |model| (model.forward(x.clone()) - x).square().mean())?;
///     println!("loss {}", trainer.mean_loss(&step)?);
/// }
/// let model = trainer.finish()?;
/// # Ok::<_, burn_fsep::FsepError>(())
/// ```
///
/// After an error that all ranks have alike (a gradient norm that is not finite, say) the trainer can go on; after any other one
/// the ranks' group is spent.
pub struct Trainer<M, O = ModuleOptimizer> {
    runtime: FsepRuntime,
    /// `None` after an optimizer step that failed.
    model: Option<M>,
    optimizer: O,
    gradients: GradientStep<M>,
    connect: bool,
    planner: Option<PlannerCallback>,
    checkpoints: Option<Checkpoints>,
    save_every: Option<u64>,
    progress: TrainingProgress,
    /// Batches since the last optimizer step.
    batches: u64,
    /// No batch was trained on yet.
    is_first: bool,
}

/// What a [`Trainer`]'s step has done.
#[derive(Debug, Clone)]
pub struct TrainerStep {
    /// This rank's loss, without its graph. `[1]`
    pub loss: Tensor<1>,
    /// The number of the optimizer step, from 1; `None` if gradients accumulate further.
    pub optimizer_step: Option<u64>,
    /// The global norm of the step's gradients before clipping, equal on all ranks; `None` where they are neither clipped nor checked.
    pub gradient_norm: Option<f64>,
}

impl TrainerConfig {
    /// The trainer of a rank. `optimizer` is one of Burn's, or a [`ShardedOptimizer`](super::ShardedOptimizer), of whose state each rank
    /// keeps its part, or a [`WholeMatrixOptimizer`](super::WholeMatrixOptimizer), which steps experts whole. Gives all ranks rank 0's values of the replicated parameters
    /// ([`broadcast_parameters`](super::broadcast_parameters)). Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if the configuration cannot work or ranks have different models; [`FsepError::ExpertOptimizer`] if the
    /// optimizer does not step experts element by element; what the planner, the checkpoints or the collectives return.
    pub fn init<M: Module, O: TrainOptimizer>(
        &self,
        runtime: &FsepRuntime,
        model: M,
        optimizer: O,
    ) -> Result<Trainer<M, O>, FsepError> {
        Trainer::new(self, runtime, model, optimizer)
    }
}

impl<M: Module, O: TrainOptimizer> Trainer<M, O> {
    fn new(config: &TrainerConfig, runtime: &FsepRuntime, model: M, optimizer: O) -> Result<Self, FsepError> {
        let gradients = GradientStep::new(runtime, config, O::HELD)?;
        let checkpoints = config.checkpoints.as_ref().map(|config| config.init(runtime)).transpose()?;
        let model = broadcast_parameters(runtime, model)?;
        if O::HELD != HeldState::OwnExperts {
            check_experts(runtime, optimizer.module_optimizer(), &model)?;
        }
        let mut planner = config.planner.as_ref().map(|planner| planner.init());
        if let Some(planner) = &mut planner {
            if config.start.step > 0 {
                told(runtime, planner.on_resume(&records_of_group(runtime, &config.start.records)))?;
            }
            told(runtime, planner.on_train_start(runtime))?;
        }
        Ok(Self {
            runtime: runtime.clone(),
            model: Some(model),
            optimizer,
            gradients,
            connect: config.connect,
            planner,
            checkpoints,
            save_every: config.checkpoints.as_ref().and_then(|config| config.every),
            progress: config.start.clone(),
            batches: 0,
            is_first: true,
        })
    }

    /// Trains on a batch. `loss` is the forward pass: it returns the rank's loss, whose mean over ranks is trained on;
    /// see [`token_mean`](super::token_mean) where ranks have unequally many tokens. `lr` is a number or what one of Burn's schedulers
    /// returns, and is used if the batch completes an optimizer step. Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::GradientNorm`] or [`FsepError::ReplicasDiffer`], on all ranks and before anything is changed; what forward,
    /// backward, the planner, a checkpoint or the collectives return; [`FsepError::Panicked`].
    pub fn step(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        loss: impl FnOnce(&M) -> Tensor<1>,
    ) -> Result<TrainerStep, FsepError> {
        let model = self.model.as_ref().ok_or_else(ended)?;
        if let (true, Some(planner)) = (self.gradients.begins_window(), &mut self.planner) {
            told(&self.runtime, planner.on_window_start(&self.runtime))?;
        }
        self.gradients.begin(model)?;
        let (loss, grads) = self.runtime.run(|| {
            let loss = loss(model);
            self.check_loss(&loss).unwrap_or_else(|error| self.runtime.fail(error));
            let value = loss.clone().inner();
            let loss = if self.connect { self.runtime.connect(loss) } else { loss };
            (value, GradientsParams::from_grads(loss.backward(), model))
        })?;
        self.is_first = false;
        self.batches += 1;
        let grads = self.gradients.add(model, grads);
        let mut step = TrainerStep { loss, optimizer_step: None, gradient_norm: None };
        if let Some(grads) = grads {
            step.gradient_norm = self.optimize(lr.into(), grads)?;
            step.optimizer_step = Some(self.progress.step);
        }
        if let Some(planner) = &mut self.planner {
            told(&self.runtime, planner.adopt(&self.runtime))?;
        }
        self.save_if_due(step.optimizer_step.is_some())?;
        Ok(step)
    }

    /// A loss is one number. In the first step, that of some rank depends on parameters; one of a rank without tokens need not.
    fn check_loss(&self, loss: &Tensor<1>) -> Result<(), FsepError> {
        if loss.dims() != [1] {
            return Err(FsepError::Shape {
                what: "loss".into(),
                expected: "[1], the mean or sum over a batch".into(),
                actual: format!("{:?}", loss.dims()),
            });
        }
        if self.is_first {
            let operation = Operation::new("losses that depend on parameters");
            let tracked = all_gather_u64(self.runtime.comm(), operation, &[u64::from(loss.is_tracked())])?;
            if tracked.iter().all(|&tracked| tracked == 0) {
                return Err(FsepError::Config(
                    "the loss depends on no parameter, so nothing would be trained: make the model on `device.autodiff()`, and \
                     take no `inner()` or `detach()` on the way to the loss"
                        .into(),
                ));
            }
        }
        Ok(())
    }

    /// Makes an optimizer step of the batches that wait for the rest of theirs, as at the end of an epoch. Returns its number;
    /// `None` if there are none. Collective.
    ///
    /// # Errors
    ///
    /// As [`Trainer::step`].
    pub fn end_window(&mut self, lr: impl Into<ModuleLearningRate>) -> Result<Option<u64>, FsepError> {
        let model = self.model.as_ref().ok_or_else(ended)?;
        let Some(grads) = self.gradients.end_window(model) else { return Ok(None) };
        self.optimize(lr.into(), grads)?;
        self.save_if_due(true)?;
        Ok(Some(self.progress.step))
    }

    /// Forgets the batches that wait for the rest of theirs: layouts and planner go back to where they were before the first of
    /// them. On all ranks; nothing if there are none.
    ///
    /// # Errors
    ///
    /// The planner's.
    pub fn discard_window(&mut self) -> Result<(), FsepError> {
        let is_in_window = self.gradients.is_in_window();
        self.batches = 0;
        self.gradients.discard_window()?;
        match &mut self.planner {
            Some(planner) if is_in_window => told(&self.runtime, planner.on_window_discarded(&self.runtime)),
            _ => Ok(()),
        }
    }

    fn optimize(&mut self, lr: ModuleLearningRate, mut grads: GradientsParams) -> Result<Option<f64>, FsepError> {
        let step = self.progress.step + 1;
        let model = self.model.as_ref().ok_or_else(ended)?;
        let norm = self.gradients.reduce(model, &mut grads, step)?;
        let span = self.runtime.timeline().and_then(|timeline| timeline.compute("optimizer"));
        // Without another handle on the model, the optimizer may write in place.
        let model = self.model.take().ok_or_else(ended)?;
        let stepped: Result<M, FsepError> = self.runtime.run(|| {
            let model = self.optimizer.step_model(lr, model, grads)?;
            Ok(update_expert_biases(&self.runtime, model))
        })?;
        self.model = Some(stepped?);
        drop(span);
        self.progress.step = step;
        self.progress.iteration += std::mem::take(&mut self.batches);
        Ok(norm)
    }

    fn save_if_due(&mut self, has_stepped: bool) -> Result<(), FsepError> {
        if has_stepped && self.save_every.is_some_and(|every| self.progress.step.is_multiple_of(every)) {
            self.save()
        } else if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.poll()?;
            Ok(())
        } else {
            Ok(())
        }
    }

    /// Saves a checkpoint now. Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] without [`TrainerConfig::with_checkpoints`], or where batches wait for the rest of theirs: their gradients
    /// are in no checkpoint. What [`Checkpoints::save`] returns.
    pub fn save(&mut self) -> Result<(), FsepError> {
        if self.gradients.is_in_window() {
            return Err(FsepError::Config(
                "a checkpoint has no place for accumulated gradients: call `end_window` or `discard_window` before"
                    .into(),
            ));
        }
        let Some(checkpoints) = &mut self.checkpoints else {
            return Err(FsepError::Config(
                "there is no folder for checkpoints: use `TrainerConfig::with_checkpoints`".into(),
            ));
        };
        let model = self.model.as_ref().ok_or_else(ended)?;
        if let Some(planner) = &mut self.planner {
            let records = &mut self.progress.records;
            told(&self.runtime, gather_records(&self.runtime, records, |records| planner.on_checkpoint(records)))?;
        }
        Ok(checkpoints.save(model, &self.optimizer, &self.progress)?)
    }

    /// The mean over ranks of a step's loss. Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the loss cannot be read, [`FsepError::Comm`] if the collective fails.
    pub fn mean_loss(&self, step: &TrainerStep) -> Result<f64, FsepError> {
        let data = step.loss.clone().try_into_data().map_err(|error| FsepError::Device(error.to_string()));
        let data = data.inspect_err(|error| self.runtime.comm().abort(&error.to_string()))?;
        let mut mean = [data.iter::<f64>().sum()];
        self.runtime.comm().all_reduce(Operation::new("loss"), ReduceBuffer::F64(&mut mean), ReduceOp::Mean)?;
        Ok(mean[0])
    }

    /// The model.
    ///
    /// # Panics
    ///
    /// If an optimizer step has failed while it changed the model.
    pub fn model(&self) -> &M {
        self.model.as_ref().unwrap_or_else(|| panic!("{}", ended()))
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &O {
        &self.optimizer
    }

    /// Where training stands: the optimizer steps, and the batches of the epoch that are in them.
    pub fn progress(&self) -> &TrainingProgress {
        &self.progress
    }

    /// The same to be changed: the epoch, and notes and records of your own, which go into checkpoints.
    pub fn progress_mut(&mut self) -> &mut TrainingProgress {
        &mut self.progress
    }

    /// What the planner did, if there is one.
    pub fn planner_report(&self) -> Option<PlannerReport> {
        self.planner.as_ref().map(PlannerCallback::report)
    }

    /// Ends training: completes a checkpoint that is still being written, and ends the planner. Returns the model. Collective.
    ///
    /// # Errors
    ///
    /// As [`Checkpoints::finish`]; the planner's.
    pub fn finish(mut self) -> Result<M, FsepError> {
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.finish()?;
        }
        if let Some(planner) = &mut self.planner {
            told(&self.runtime, planner.on_train_end(&self.runtime))?;
        }
        self.model.ok_or_else(ended)
    }
}

fn ended() -> FsepError {
    FsepError::Config("an optimizer step has failed while it changed the model: go on from a checkpoint".into())
}

/// A result of the planner's; peers learn of its error.
fn told(runtime: &FsepRuntime, result: Result<(), FsepError>) -> Result<(), FsepError> {
    result.inspect_err(|error| runtime.comm().abort(&error.to_string()))
}
