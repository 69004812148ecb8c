use std::sync::Arc;

use burn::{
    lr_scheduler::LrSchedulerRecord,
    optim::OptimizerRecord,
    store::ModuleRecord,
    train::{
        Learner, LearnerModel, LearningCheckpointer,
        checkpoint::{
            AsyncCheckpointer, Checkpoint, Checkpointer, CheckpointerError, CheckpointingAction, CheckpointingStrategy,
        },
        metric::store::EventStoreClient,
    },
};
use parking_lot::Mutex;

use crate::{
    FsepError, FsepRuntime,
    checkpoint::{CheckpointConfig, Checkpoints, TrainingProgress},
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
        Ok(Self { checkpoints, every: config.and_then(|config| config.every), event_store, progress, saved })
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

    /// Saves a checkpoint.
    pub fn save<M: LearnerModel>(&mut self, learner: &Learner<M>) -> Result<(), FsepError> {
        let Some(checkpoints) = &mut self.checkpoints else { return Ok(()) };
        let (_, optimizer, scheduler) = records(learner, &self.event_store)?;
        let progress = self.progress.clone().with_scheduler(scheduler)?;
        checkpoints.save_records(&learner.model(), optimizer, &progress)?;
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

/// A Learner's records. It shows its optimizer and scheduler to nobody but a `LearningCheckpointer`; so one that keeps
/// what it gets.
fn records<M: LearnerModel>(
    learner: &Learner<M>,
    event_store: &EventStoreClient,
) -> Result<(ModuleRecord, OptimizerRecord, LrSchedulerRecord), FsepError> {
    let (model, optimizer, scheduler) = (Kept::default(), Kept::default(), Kept::default());
    let mut checkpointer = LearningCheckpointer::new(
        AsyncCheckpointer::new(model.clone()),
        AsyncCheckpointer::new(optimizer.clone()),
        AsyncCheckpointer::new(scheduler.clone()),
        Box::new(AlwaysSave),
    );
    checkpointer.checkpoint(learner, 0, event_store);
    // Waits for the checkpointer's threads.
    drop(checkpointer);
    match (model.take(), optimizer.take(), scheduler.take()) {
        (Some(model), Some(optimizer), Some(scheduler)) => Ok((model, optimizer, scheduler)),
        _ => Err(FsepError::Learner("it did not hand over its records".into())),
    }
}

/// A checkpointer that keeps the record in memory.
struct Kept<R>(Arc<Mutex<Option<R>>>);

impl<R> Default for Kept<R> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<R> Clone for Kept<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R> Kept<R> {
    fn take(&self) -> Option<R> {
        self.0.lock().take()
    }
}

impl<R: Checkpoint> Checkpointer<R> for Kept<R> {
    fn save(&self, _epoch: usize, record: R) -> Result<(), CheckpointerError> {
        *self.0.lock() = Some(record);
        Ok(())
    }

    fn delete(&self, _epoch: usize) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, _epoch: usize) -> Result<R, CheckpointerError> {
        Err(CheckpointerError::Unknown("nothing is restored from here".into()))
    }
}

struct AlwaysSave;

impl CheckpointingStrategy for AlwaysSave {
    fn checkpointing(&mut self, _epoch: usize, _store: &EventStoreClient) -> Vec<CheckpointingAction> {
        vec![CheckpointingAction::Save]
    }
}
