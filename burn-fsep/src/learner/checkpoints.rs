use std::{collections::BTreeMap, sync::Arc};

use burn::train::{Learner, LearnerModel, metric::store::EventStoreClient};
use burn_fsep_planner::Layout;

use crate::{
    FsepError, FsepRuntime,
    burn_compat::learner_records,
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
    window: Option<WindowStart>,
    /// The records are those of a window's start.
    pub is_rewound: bool,
}

/// What a checkpoint has to have of the time before the first batch of an accumulation window, if training is stopped in it.
struct WindowStart {
    layouts: Vec<Arc<Layout>>,
    records: BTreeMap<String, Vec<u8>>,
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
        Ok(Self { checkpoints, every, event_store, progress, saved, window: None, is_rewound: false })
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
        let records = learner_records(learner, &self.event_store);
        let (optimizer, scheduler) =
            records.ok_or_else(|| FsepError::Learner("it did not hand over its records".into()))?;
        let progress = self.progress.clone().with_scheduler(scheduler)?;
        checkpoints.save_records(&learner.model(), optimizer, &progress)?;
        (self.saved, self.window) = (Some(self.progress.step), None);
        Ok(())
    }

    /// Remembers what a checkpoint of now would have, with the callbacks' records.
    pub fn begin_window(&mut self, runtime: &FsepRuntime) {
        let layouts = (0..runtime.num_layers()).map(|layer| runtime.layout(layer)).collect();
        self.window = Some(WindowStart { layouts, records: self.progress.records.clone() });
    }

    /// Goes back to where the window began, as far as a checkpoint knows of it: the next one is of there.
    pub fn rewind(&mut self, runtime: &FsepRuntime) -> Result<(), FsepError> {
        let Some(WindowStart { layouts, records }) = self.window.take() else { return Ok(()) };
        for (layer, layout) in layouts.into_iter().enumerate() {
            if !runtime.has_fixed_layout(layer) {
                runtime.resume_layout(layer, layout)?;
            }
        }
        self.progress.records = records;
        self.is_rewound = true;
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
