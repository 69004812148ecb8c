//! What a training loop and the planner tell each other between steps.

use std::{collections::BTreeMap, error::Error, fmt, sync::Arc};

use thiserror::Error;

use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// Learns the routing counts of every training forward pass as soon as they are known.
pub trait RoutingObserver: Send + Sync + fmt::Debug {
    /// The counts of a layer's `step`-th training forward pass, numbered from 1. Must return at once.
    fn observe(&self, layer: usize, step: u64, counts: &Arc<RoutingCounts>);
}

/// What callbacks can ask of the runtime of their rank.
pub trait PlannerHost {
    /// Number of FSEP layers.
    fn num_layers(&self) -> usize;

    /// The ranks and their nodes.
    fn topology(&self) -> Topology;

    /// The layout that a layer uses now.
    fn layout(&self, layer: usize) -> Arc<Layout>;

    /// Whether a layer's layout may change; not so for experts with fixed owners.
    fn is_plannable(&self, layer: usize) -> bool;

    /// Sets a layer's layout from its next forward pass on. All ranks must set the same one.
    ///
    /// # Errors
    ///
    /// [`CallbackError`] if the layout does not fit the layer.
    fn set_layout(&self, layer: usize, layout: Arc<Layout>) -> Result<(), CallbackError>;

    /// Sets who learns the routing counts; `None` for nobody.
    fn set_observer(&self, observer: Option<Arc<dyn RoutingObserver>>);

    /// The element-wise minimum of all ranks' `values`, which are equally many. Collective.
    ///
    /// # Errors
    ///
    /// [`CallbackError`] if a rank is lost.
    fn agree_min(&self, values: &[u64]) -> Result<Vec<u64>, CallbackError>;
}

/// The batch after which a callback is called.
#[derive(Clone, Copy)]
pub struct StepContext<'a> {
    /// The epoch, from 1.
    pub epoch: usize,
    /// The batch in the epoch, from 1.
    pub iteration: usize,
    /// The rank's runtime.
    pub host: &'a dyn PlannerHost,
}

impl<'a> StepContext<'a> {
    /// The context of a batch.
    pub fn new(epoch: usize, iteration: usize, host: &'a dyn PlannerHost) -> Self {
        Self { epoch, iteration, host }
    }
}

/// The optimizer step after which a callback is called.
#[derive(Clone, Copy)]
pub struct OptimizerContext<'a> {
    /// The optimizer step of the training, from 1; one that goes on from a checkpoint of burn-fsep goes on counting, too.
    pub step: u64,
    /// The global norm of its gradients before clipping, equal on all ranks; `None` where nothing is clipped.
    pub gradient_norm: Option<f64>,
    /// The rank's runtime.
    pub host: &'a dyn PlannerHost,
}

impl<'a> OptimizerContext<'a> {
    /// The context of an optimizer step.
    pub fn new(step: u64, gradient_norm: Option<f64>, host: &'a dyn PlannerHost) -> Self {
        Self { step, gradient_norm, host }
    }
}

/// Something that a training loop calls between steps, on every rank.
pub trait TrainingCallback: Send {
    /// Called before [`on_train_start`](Self::on_train_start) where training goes on from a checkpoint, with its records:
    /// those of [`on_checkpoint`](Self::on_checkpoint) are among them if the callback was there.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_resume(&mut self, _records: &BTreeMap<String, Vec<u8>>) -> Result<(), CallbackError> {
        Ok(())
    }

    /// Called before the first step.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_train_start(&mut self, _host: &dyn PlannerHost) -> Result<(), CallbackError> {
        Ok(())
    }

    /// Called after each optimizer step.
    ///
    /// Without gradient accumulation that is once a batch, before its [`on_step_end`](Self::on_step_end). With it, only
    /// batches that complete a step have it, and where an epoch ends with fewer batches than a step takes, the step that
    /// they make comes after the last one's `on_step_end`.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_optimizer_step(&mut self, _context: &OptimizerContext<'_>) -> Result<(), CallbackError> {
        Ok(())
    }

    /// Called after each batch, forward and backward, whether or not its gradients have made an optimizer step yet.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), CallbackError>;

    /// Called when a checkpoint is made after a step, on rank 0, whose records are saved: adds what the callback has to know
    /// again to go on as if training had not stopped.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_checkpoint(&mut self, _records: &mut BTreeMap<String, Vec<u8>>) -> Result<(), CallbackError> {
        Ok(())
    }

    /// Called after the last step.
    ///
    /// # Errors
    ///
    /// An error is reported as the training's.
    fn on_train_end(&mut self, _host: &dyn PlannerHost) -> Result<(), CallbackError> {
        Ok(())
    }
}

/// Why a callback failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CallbackError {
    /// The planner refused its input or stopped.
    #[error(transparent)]
    Planner(#[from] PlannerError),
    /// The runtime failed.
    #[error(transparent)]
    Host(Box<dyn Error + Send + Sync>),
}
