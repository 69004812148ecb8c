use thiserror::Error;

/// Why a job could not be started. How its ranks end is told by the exit code.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LauncherError {
    /// A job has ranks.
    #[error("a job needs at least one rank")]
    NoRanks,
    /// The program cannot be started.
    #[error("rank {rank}: `{program}` cannot be started: {error}")]
    Start {
        /// The rank.
        rank: usize,
        /// The program.
        program: String,
        /// What the operating system said.
        error: std::io::Error,
    },
    /// The operating system refused something else that the launcher needs.
    #[error("{what}: {error}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// What the operating system said.
        error: std::io::Error,
    },
}

/// For `map_err`: the operating system refused `what`.
pub(super) fn system(what: &'static str) -> impl Fn(std::io::Error) -> LauncherError {
    move |error| LauncherError::System { what, error }
}
