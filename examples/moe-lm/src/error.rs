use std::path::{Path, PathBuf};

use burn_fsep::{
    FsepError,
    comm::{CommError, EnvironmentError},
};
use thiserror::Error;

/// Why the job could not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MoeLmError {
    /// An option that cannot work.
    #[error("{0}")]
    Option(String),
    /// Launcher variables that do not make a rank.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// A device that cannot be used.
    #[error("{0}")]
    Device(String),
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// No text to train on.
    #[error("{0}")]
    Corpus(String),
    /// Training failed.
    #[error(transparent)]
    Fsep(#[from] FsepError),
    /// Training was told to stop, and saved a checkpoint.
    #[error("stopped after a checkpoint; --resume auto goes on from it")]
    Stopped,
    /// Training failed on some ranks.
    #[error("{0}")]
    Ranks(String),
    /// This rank, a process, ended with an error that the first rank reports, too.
    #[error("{0}")]
    ReportedByFirst(Box<MoeLmError>),
}

impl From<CommError> for MoeLmError {
    fn from(error: CommError) -> Self {
        Self::Fsep(error.into())
    }
}

impl MoeLmError {
    /// For `map_err`: names the file that an operation was about.
    pub(crate) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::File { path: path.to_path_buf(), source }
    }
}
