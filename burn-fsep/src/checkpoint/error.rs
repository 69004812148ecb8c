use std::{io, path::Path, path::PathBuf};

use thiserror::Error;

use crate::comm::CommError;

/// Why a checkpoint could not be saved or loaded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file system refused.
    #[error("cannot {action} {}: {reason}", path.display())]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A file is not what was written: cut off, changed, missing, or of another checkpoint.
    #[error("{} is damaged or not of this checkpoint: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The checkpoint was written in a format that this version does not know.
    #[error(
        "{} has format version {found}, this version of burn-fsep reads up to {newest}: use the version that wrote it \
         ({writer})",
        path.display()
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        newest: u32,
        /// What wrote it.
        writer: String,
    },
    /// The model is not the one that was saved.
    #[error("{} does not fit the model: `{parameter}` {reason}", checkpoint.display())]
    Model {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Path of the parameter in the model.
        parameter: String,
        /// What differs.
        reason: String,
    },
    /// The optimizer is not the one that was saved.
    #[error("{} does not fit the optimizer: its state of `{parameter}` {reason}", checkpoint.display())]
    Optimizer {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Path of the parameter in the model.
        parameter: String,
        /// What differs.
        reason: String,
    },
    /// What has to be equal on all ranks is not.
    #[error("ranks 0 and {rank} differ in {what}; {hint}")]
    Divergence {
        /// What differs.
        what: String,
        /// The first rank that differs from rank 0.
        rank: usize,
        /// What to do.
        hint: &'static str,
    },
    /// A model or optimizer that cannot be saved.
    #[error("`{what}` cannot be saved: {reason}")]
    Unsupported {
        /// The parameter or state.
        what: String,
        /// Why.
        reason: String,
    },
    /// No checkpoint of a folder can be loaded.
    #[error("all {count} checkpoints in {} are damaged; the newest: {newest}", folder.display())]
    NoneWhole {
        /// The folder.
        folder: PathBuf,
        /// How many there are.
        count: usize,
        /// What is wrong with the newest.
        newest: String,
    },
    /// An option that cannot work.
    #[error("invalid checkpoint configuration: {0}")]
    Config(String),
    /// Another rank failed; so none has saved or loaded anything.
    #[error("rank {rank} failed: {message}")]
    Peer {
        /// The rank that failed.
        rank: usize,
        /// Its error.
        message: String,
        /// Whether its error is [`CheckpointError::Damaged`].
        damaged: bool,
    },
    /// A thread that reads or writes files panicked.
    #[error("reading or writing the checkpoint panicked: {0}")]
    Panicked(String),
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] CommError),
}

impl CheckpointError {
    /// Whether a file is damaged, here or as another rank saw it: an older checkpoint may be whole.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Peer { damaged: true, .. })
    }

    /// Makes a system error one of a file.
    pub(super) fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |error| Self::Io { action, path: path.to_path_buf(), reason: error.to_string() }
    }

    pub(super) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_path_buf(), reason: reason.into() }
    }
}
