use std::path::{Path, PathBuf};

use burn_fsep::{
    FsepError,
    comm::CommError,
    hub::HubError,
    launch::{LaunchError, RunError},
    planner::memory::Phase,
};
use thiserror::Error;

/// Why a command could not be done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MoeHfError {
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
    /// A file or text whose content cannot be used.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A model that this program does not run.
    #[error("{0}")]
    Model(String),
    /// No text to train on.
    #[error("{0}")]
    Corpus(String),
    /// A model's folder could not be read or written.
    #[error("{0}")]
    Hub(Box<HubError>),
    /// The model's scores are no numbers.
    #[error(
        "no token can be token {token}: its scores are no numbers, so the model's values are damaged, or training diverged"
    )]
    NoScore {
        /// Its place in the text.
        token: usize,
    },
    /// A job that takes more memory than there is.
    #[error(
        "the job does not fit: a rank is estimated to take {needed_gib:.2} GiB at its peak ({phase}), and {limit_gib:.2} GiB is what it \
         has. {advice}"
    )]
    DoesNotFit {
        /// GiB of a rank.
        needed_gib: f64,
        /// When it takes them.
        phase: Phase,
        /// GiB that it may take.
        limit_gib: f64,
        /// What would fit.
        advice: String,
    },
    /// The computation failed.
    #[error(transparent)]
    Fsep(#[from] FsepError),
    /// A rank failed.
    #[error("{0}")]
    Run(Box<RunError<MoeHfError>>),
}

impl From<CommError> for MoeHfError {
    fn from(error: CommError) -> Self {
        Self::Fsep(error.into())
    }
}

impl From<HubError> for MoeHfError {
    fn from(error: HubError) -> Self {
        Self::Hub(Box::new(error))
    }
}

impl From<RunError<MoeHfError>> for MoeHfError {
    fn from(error: RunError<MoeHfError>) -> Self {
        Self::Run(Box::new(error))
    }
}

impl MoeHfError {
    /// For `map_err`: names the file that an operation was about.
    pub(crate) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::File { path: path.to_path_buf(), source }
    }

    /// The content of this file cannot be used.
    pub(crate) fn content(path: &Path, reason: impl ToString) -> Self {
        Self::Content { path: path.to_path_buf(), reason: reason.to_string() }
    }
}
