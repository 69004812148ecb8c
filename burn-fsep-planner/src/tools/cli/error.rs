use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::{
    PlannerError,
    tools::{benchmark::BenchmarkSize, simulator::SimulatorError, trace::TraceError, workload::WorkloadError},
};

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
    /// A figure that cannot be drawn.
    #[error("cannot draw a figure: {0}")]
    Figure(String),
    /// A setting in a file that makes no sense.
    #[error("{}: {}{source}", path.display(), line.map(|line| format!("line {line}: ")).unwrap_or_default())]
    Setting {
        /// The file.
        path: PathBuf,
        /// The line of the field, counted from 1, if the file spells it out.
        line: Option<usize>,
        /// What is wrong.
        source: SimulatorError,
    },
    /// An option that makes no sense.
    #[error("--{}: {source}", source.field().unwrap_or("option").replace('_', "-"))]
    Option {
        /// What is wrong.
        source: SimulatorError,
    },
    /// A job that takes more memory than a rank has.
    #[error("{table}\n{needed:.1} GiB are more than the {limit:.1} GiB of a rank that tensors may take. {advice}")]
    DoesNotFit {
        /// What takes it.
        table: String,
        /// GiB that the job takes.
        needed: f64,
        /// GiB that it may take.
        limit: f64,
        /// What to change.
        advice: String,
    },
    /// A number of ranks that `benchmark` has no layer for.
    #[error("--ranks: there is no layer for {0} ranks; choose of {known}", known = ranks())]
    BenchmarkRanks(usize),
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

/// The numbers of ranks that `benchmark` knows.
fn ranks() -> String {
    let mut ranks = BenchmarkSize::ALL.map(|size| size.ranks).to_vec();
    ranks.sort_unstable();
    ranks.dedup();
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

impl CliError {
    pub(super) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::File { path: path.to_path_buf(), source }
    }

    /// The error of a setting in the file of the given text: finds the line that names the field.
    pub(super) fn setting<'a>(path: &'a Path, text: &'a str) -> impl Fn(SimulatorError) -> Self + 'a {
        move |source| {
            let names = |line: &str| source.field().is_some_and(|field| line.contains(&format!("\"{field}\"")));
            let line = text.lines().position(names).map(|line| line + 1);
            Self::Setting { path: path.to_path_buf(), line, source }
        }
    }

    pub(super) fn plan(path: &Path) -> impl Fn(PlannerError) -> Self + '_ {
        |source| Self::Plan { path: path.to_path_buf(), source }
    }
}
