use std::collections::BTreeMap;

use burn::{lr_scheduler::LrSchedulerRecord, tensor::Bytes};

use super::CheckpointError;

/// Where training stands, and what else a run needs to go on from there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrainingProgress {
    /// Optimizer steps done.
    pub step: u64,
    /// The epoch that training is in, from 1.
    pub epoch: u64,
    /// Batches of that epoch done.
    pub iteration: u64,
    /// Notes of the user's own. Those of rank 0 are saved.
    pub metadata: BTreeMap<String, String>,
    /// Records of the user's own, for example of a scheduler or a random generator. Those of rank 0 are saved.
    pub records: BTreeMap<String, Vec<u8>>,
}

impl TrainingProgress {
    /// The name of the record that [`TrainingProgress::with_scheduler`] makes.
    pub const SCHEDULER: &'static str = "scheduler";

    /// After `step` optimizer steps, in the first epoch.
    pub fn new(step: u64) -> Self {
        Self { step, epoch: 1, iteration: step, ..Self::default() }
    }

    /// Sets the epoch (from 1) and how many of its batches are done.
    pub fn with_epoch(mut self, epoch: u64, iteration: u64) -> Self {
        (self.epoch, self.iteration) = (epoch, iteration);
        self
    }

    /// Adds a note.
    pub fn with_metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Adds a record.
    pub fn with_record(mut self, name: impl Into<String>, bytes: Vec<u8>) -> Self {
        self.records.insert(name.into(), bytes);
        self
    }

    /// Adds the record of a learning rate scheduler.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Unsupported`] if Burn cannot make bytes of it.
    pub fn with_scheduler(self, record: LrSchedulerRecord) -> Result<Self, CheckpointError> {
        let bytes = record.into_bytes().map_err(|error| CheckpointError::Unsupported {
            what: "learning rate scheduler".into(),
            reason: error.to_string(),
        })?;
        Ok(self.with_record(Self::SCHEDULER, bytes.to_vec()))
    }

    /// The record of the learning rate scheduler, if there is one.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Unsupported`] if the record is none of a scheduler.
    pub fn scheduler(&self) -> Result<Option<LrSchedulerRecord>, CheckpointError> {
        let Some(bytes) = self.records.get(Self::SCHEDULER) else { return Ok(None) };
        let record = LrSchedulerRecord::from_bytes(Bytes::from_bytes_vec(bytes.clone()));
        record.map(Some).map_err(|error| CheckpointError::Unsupported {
            what: "learning rate scheduler".into(),
            reason: error.to_string(),
        })
    }
}
