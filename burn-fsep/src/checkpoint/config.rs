use std::path::PathBuf;

use derive_new::new;

use super::{CheckpointError, Checkpoints};
use crate::FsepRuntime;

/// Where checkpoints go and how many are kept; equal on all ranks.
#[derive(new, Debug, Clone, PartialEq, Eq)]
pub struct CheckpointConfig {
    /// The folder, on a file system that all ranks share. One job at a time writes to it.
    #[new(into)]
    pub folder: PathBuf,
    /// How many checkpoints are kept: the newest ones.
    #[new(value = "2")]
    pub keep: usize,
    /// Optimizer steps between two checkpoints of [`Trainer`](crate::train::Trainer) and of `FsepStrategy`, which also saves at
    /// the end of each epoch; `None` for nothing in between.
    #[new(default)]
    pub every: Option<u64>,
    /// Whether training goes on while files are written. Their content is copied to host memory first.
    #[new(value = "false")]
    pub background: bool,
}

impl CheckpointConfig {
    /// Sets how many checkpoints are kept (2 by default).
    pub fn with_keep(mut self, keep: usize) -> Self {
        self.keep = keep;
        self
    }

    /// Sets how many optimizer steps lie between two checkpoints of a strategy.
    pub fn with_every(mut self, steps: u64) -> Self {
        self.every = Some(steps);
        self
    }

    /// Sets whether training goes on while files are written.
    pub fn with_background(mut self, background: bool) -> Self {
        self.background = background;
        self
    }

    /// The checkpoints of the rank of `runtime`.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Config`] if nothing would be kept or a checkpoint is due every 0 steps.
    pub fn init(&self, runtime: &FsepRuntime) -> Result<Checkpoints, CheckpointError> {
        for (name, value) in [("keep", self.keep as u64), ("every", self.every.unwrap_or(1))] {
            if value == 0 {
                return Err(CheckpointError::Config(format!("`{name}` must be at least 1")));
            }
        }
        Ok(Checkpoints::new(self.clone(), runtime.clone()))
    }
}
