use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::{PlannerError, trace::TraceError, workload::WorkloadError};

/// Why a command failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CliError {
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file that is not the JSON expected.
    #[error("{}: {source}; expected {expected}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
        /// What was expected.
        expected: &'static str,
    },
    /// A file that is not a trace.
    #[error("{}: {source}", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TraceError,
    },
    /// Counts and options that do not go together.
    #[error("{}: {source}", path.display())]
    Plan {
        /// The file with the counts, or the workload.
        path: PathBuf,
        /// What is wrong.
        source: PlannerError,
    },
    /// A workload that cannot be generated.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// No step is left to report on.
    #[error("{}: no layer has more than {skipped} step(s), so none is left to report on; lower --skip-steps", path.display())]
    NoSteps {
        /// The trace or the workload.
        path: PathBuf,
        /// Steps skipped.
        skipped: usize,
    },
}

impl CliError {
    pub(super) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::File { path: path.to_path_buf(), source }
    }

    pub(super) fn plan(path: &Path) -> impl Fn(PlannerError) -> Self + '_ {
        |source| Self::Plan { path: path.to_path_buf(), source }
    }
}
