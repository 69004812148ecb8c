use std::{fmt, process::ExitCode};

use thiserror::Error;

use super::EnvironmentError;
use crate::comm::{CommError, local::RankError};

/// Why this process is no rank.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// Launcher variables that do not make a rank.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// A configuration that cannot work here, or with that of the other ranks.
    #[error("{0}")]
    Config(String),
    /// A device that cannot be used.
    #[error("{0}")]
    Device(String),
}

/// How the ranks of this process ended without a result. `E` is the error of their program.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RunError<E> {
    /// This process is no rank.
    Launch(#[from] LaunchError),
    /// The ranks could not be connected.
    Comm(#[from] CommError),
    /// The program returned an error.
    Program(E),
    /// A rank that is a thread failed, or one panicked.
    Rank(Box<RankError<RunError<E>>>),
    /// This rank, a process, ended with an error that the first rank reports, too.
    ReportedByFirst(Box<RunError<E>>),
}

// By hand: a derived one has bounds that contain themselves.
impl<E: fmt::Display> fmt::Display for RunError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunError::Launch(error) => error.fmt(f),
            RunError::Comm(error) => error.fmt(f),
            RunError::Program(error) => error.fmt(f),
            RunError::Rank(error) => error.fmt(f),
            RunError::ReportedByFirst(error) => error.fmt(f),
        }
    }
}

impl<E> RunError<E> {
    /// The error that the program returned, if it did.
    pub fn program(&self) -> Option<&E> {
        match self {
            RunError::Program(error) => Some(error),
            RunError::Rank(rank) => match rank.as_ref() {
                RankError::Failed { error, .. } => error.program(),
                _ => None,
            },
            RunError::ReportedByFirst(error) => error.program(),
            RunError::Launch(_) | RunError::Comm(_) => None,
        }
    }
}

impl<E: fmt::Display> RunError<E> {
    /// Prints the error, unless the first rank does; returns the exit code for `main`, which is 1.
    pub fn report(&self) -> ExitCode {
        if !matches!(self, RunError::ReportedByFirst(_)) {
            eprintln!("error: {self}");
        }
        ExitCode::FAILURE
    }
}
