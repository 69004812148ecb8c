use std::sync::Arc;

use burn::train::{Learner, LearnerModel, metric::store::EventStoreClient};

use crate::{
    FsepError, FsepRuntime,
    burn_compat::learner_records,
    checkpoint::{CheckpointConfig, Checkpoints, HeldState, TrainingProgress},
    train::ShardedOptimizer,
};

/// Follows a Learner's training and saves checkpoints of it.
pub(super) struct LearnerCheckpoints {
    checkpoints: Option<Checkpoints>,
    every: Option<u64>,
    event_store: Arc<EventStoreClient>,
    pub progress: TrainingProgress,
    /// Step of the newest checkpoint.
    saved: Option<u64>,
}

impl LearnerCheckpoints {
    pub fn new(
        config: Option<&CheckpointConfig>,
        runtime: &FsepRuntime,
        progress: TrainingProgress,
        event_store: Arc<EventStoreClient>,
    ) -> Result<Self, FsepError> {
        let checkpoints = config.map(|config| config.init(runtime)).transpose()?;
        let saved = (progress.step > 0).then_some(progress.step);
        let every = config.and_then(|config| config.every);
        Ok(Self { checkpoints, every, event_store, progress, saved })
    }

    /// Whether a checkpoint is due after a step.
    pub fn is_due(&self) -> bool {
        self.every.is_some_and(|every| self.progress.step.is_multiple_of(every))
    }

    /// Completes a checkpoint whose files are written.
    pub fn poll(&mut self) -> Result<(), FsepError> {
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.poll()?;
        }
        Ok(())
    }

    /// Whether there is nothing to save: no checkpoints are wanted, or the newest one is of this step.
    pub fn is_saved(&self) -> bool {
        self.checkpoints.is_none() || self.saved == Some(self.progress.step)
    }

    /// Saves a checkpoint; `sharded` is the optimizer if it is not the Learner's.
    pub fn save<M: LearnerModel>(
        &mut self,
        learner: &Learner<M>,
        sharded: Option<&ShardedOptimizer>,
    ) -> Result<(), FsepError> {
        let Some(checkpoints) = &mut self.checkpoints else { return Ok(()) };
        let records = learner_records(learner, &self.event_store);
        let (optimizer, scheduler) =
            records.ok_or_else(|| FsepError::Learner("it did not hand over its records".into()))?;
        let progress = self.progress.clone().with_scheduler(scheduler)?;
        let model = learner.model();
        match sharded {
            Some(sharded) => checkpoints.save(&model, sharded, &progress)?,
            None => drop(checkpoints.save_records(&model, optimizer, HeldState::Whole, &progress)?),
        }
        self.saved = Some(self.progress.step);
        Ok(())
    }

    /// Completes the last checkpoint.
    pub fn finish(&mut self) -> Result<(), FsepError> {
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.finish()?;
        }
        Ok(())
    }
}
