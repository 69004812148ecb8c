use std::path::{Path, PathBuf};

use burn_fsep::{
    FsepError,
    comm::CommError,
    launch::{LaunchError, RunError},
};
use thiserror::Error;

/// Why the job could not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MoeLmError {
    /// An option that cannot work.
    #[error("{0}")]
    Option(String),
    /// Launcher variables or devices that do not make a rank.
    #[error(transparent)]
    Launch(#[from] LaunchError),
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
    /// Training failed otherwise.
    #[error("{0}")]
    Training(String),
    /// A rank failed.
    #[error("{0}")]
    Run(Box<RunError<MoeLmError>>),
}

impl From<CommError> for MoeLmError {
    fn from(error: CommError) -> Self {
        Self::Fsep(error.into())
    }
}

impl From<RunError<MoeLmError>> for MoeLmError {
    fn from(error: RunError<MoeLmError>) -> Self {
        Self::Run(Box::new(error))
    }
}

impl MoeLmError {
    /// For `map_err`: names the file that an operation was about.
    pub(crate) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::File { path: path.to_path_buf(), source }
    }
}
