use std::collections::BTreeMap;

use derive_new::new;

use crate::{FsepError, FsepRuntime};

/// The batch after which a callback is called.
#[derive(new, Debug, Clone, Copy)]
pub struct StepContext<'a> {
    /// The epoch, from 1.
    pub epoch: usize,
    /// The batch in the epoch, from 1.
    pub iteration: usize,
    /// The rank's runtime.
    pub runtime: &'a FsepRuntime,
}

/// The optimizer step after which a callback is called.
#[derive(new, Debug, Clone, Copy)]
pub struct OptimizerContext<'a> {
    /// The optimizer step of the training, from 1; one that goes on from a checkpoint of burn-fsep goes on counting, too.
    pub step: u64,
    /// The global norm of its gradients before clipping, equal on all ranks; `None` where they are neither clipped nor checked.
    pub gradient_norm: Option<f64>,
    /// The rank's runtime.
    pub runtime: &'a FsepRuntime,
}

/// Something that a training loop calls between steps, on every rank.
///
/// An error of the callback's own is [`FsepError::Callback`].
pub trait TrainingCallback: Send {
    /// Called before [`on_train_start`](Self::on_train_start) where training goes on from a checkpoint, with its records:
    /// those of [`on_checkpoint`](Self::on_checkpoint) are among them if the callback was there. Where groups of ranks share the experts,
    /// a rank gets what its own group's first rank has added, and otherwise the first group's.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_resume(&mut self, _records: &BTreeMap<String, Vec<u8>>) -> Result<(), FsepError> {
        Ok(())
    }

    /// Called before the first step.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_train_start(&mut self, _runtime: &FsepRuntime) -> Result<(), FsepError> {
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
    fn on_optimizer_step(&mut self, _context: &OptimizerContext<'_>) -> Result<(), FsepError> {
        Ok(())
    }

    /// Called after each batch, forward and backward, whether or not its gradients have made an optimizer step yet.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError>;

    /// Called before the first of the batches that make an optimizer step together, where checkpoints are made: remembers what
    /// [`on_window_discarded`](Self::on_window_discarded) needs. It comes often, so it should cost little.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_window_start(&mut self, _runtime: &FsepRuntime) -> Result<(), FsepError> {
        Ok(())
    }

    /// Called where the batches since [`on_window_start`](Self::on_window_start) are forgotten, as training is stopped among them:
    /// goes back to then, as layouts did. The next checkpoint is of then.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_window_discarded(&mut self, _runtime: &FsepRuntime) -> Result<(), FsepError> {
        Ok(())
    }

    /// Called when a checkpoint is made after a step, on rank 0, whose records are saved: adds what the callback has to know
    /// again to go on as if training had not stopped. Where groups of ranks share the experts it is called on the first rank of each,
    /// on all but rank 0 with no records.
    ///
    /// # Errors
    ///
    /// An error ends the training.
    fn on_checkpoint(&mut self, _records: &mut BTreeMap<String, Vec<u8>>) -> Result<(), FsepError> {
        Ok(())
    }

    /// Called after the last step.
    ///
    /// # Errors
    ///
    /// An error is reported as the training's.
    fn on_train_end(&mut self, _runtime: &FsepRuntime) -> Result<(), FsepError> {
        Ok(())
    }
}
