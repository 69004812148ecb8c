use std::{fmt, sync::Arc, thread::JoinHandle, time::Duration};

use mpi::environment::{Threading, Universe, initialize_with_threading};

use super::{
    MpiCommunicator,
    bounded::bounded,
    library::{Fault, Library},
};
use crate::comm::{CommError, Operation, control_group::engine_error};

const START: Operation = Operation::new("start of MPI");
const END: Operation = Operation::new("end of MPI");

/// MPI in this process, from its start to its end: a process has one, once.
///
/// Dropped without [`finalize`](Self::finalize), it ends all communication of its communicators but does not finalize MPI,
/// which would wait for ranks that may be lost.
pub struct MpiUniverse {
    pub(super) library: Arc<Library>,
    pub(super) rank: usize,
    pub(super) size: usize,
    /// Finalizes MPI when it is dropped. `None` once that has begun.
    universe: Option<Universe>,
    progress: Option<JoinHandle<()>>,
}

impl fmt::Debug for MpiUniverse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MpiUniverse(rank {} of {})", self.rank, self.size)
    }
}

impl MpiUniverse {
    /// Initializes MPI, for which all ranks have to come within `timeout`, and starts the thread that lets it progress.
    ///
    /// Without `mpirun` it starts as a job of one rank. MPI itself ends the process if it is not set up well.
    ///
    /// # Errors
    ///
    /// [`CommError::Engine`] if this process has initialized MPI before, or the library does not allow calls from several
    /// threads, one at a time; [`CommError::Timeout`].
    pub fn init(timeout: Duration) -> Result<Self, CommError> {
        Self::init_unless(timeout, || None)
    }

    /// As [`init`](Self::init), given up when a group has a `failure`.
    pub(super) fn init_unless(timeout: Duration, failure: impl Fn() -> Option<CommError>) -> Result<Self, CommError> {
        let failed = |reason: &str| engine_error(START, reason.into());
        let start = || initialize_with_threading(Threading::Serialized);
        let (universe, threading) = bounded(START, timeout, failure, start)?
            .ok_or_else(|| failed("this process has initialized MPI before, which is possible once"))?;
        let library = Arc::new(Library::new());
        let mut this = Self { library, rank: 0, size: 1, universe: Some(universe), progress: None };
        if threading < Threading::Serialized {
            return Err(failed("this MPI library does not let threads take turns (MPI_THREAD_SERIALIZED)"));
        }
        let place = this.library.lock().ok_or_else(|| failed("it has ended"))?.setup();
        [this.rank, this.size] = place.map_err(|Fault { reason, .. }| engine_error(START, reason))?;
        let library = this.library.clone();
        let progress = std::thread::Builder::new().name("mpi-progress".into()).spawn(move || library.progress());
        this.progress =
            Some(progress.map_err(|error| engine_error(START, format!("no thread for its progress: {error}")))?);
        Ok(this)
    }

    /// Finalizes MPI in peace: waits until all ranks of `comm` have come here and everything that this rank sent was taken.
    /// Collective. Afterwards, `comm` and its duplicates are spent.
    ///
    /// # Errors
    ///
    /// Any [`CommError`], if a rank fails or does not come here in time; MPI is not finalized then, and `mpirun` says that the
    /// process ended improperly.
    pub fn finalize(mut self, comm: &MpiCommunicator) -> Result<(), CommError> {
        let group = comm.group();
        group.drain(END)?;
        group.control.comm.barrier(END)?;
        self.library.end();
        let universe = self.universe.take();
        bounded(END, group.control.timeout, || group.control.failure(), move || drop(universe))
    }
}

impl Drop for MpiUniverse {
    fn drop(&mut self) {
        let progress = self.progress.take();
        // It cannot panic. Where a call that waits for a lost rank keeps the right to call MPI, it stays behind.
        let _ = progress.filter(|_| self.library.end()).map(JoinHandle::join);
        std::mem::forget(self.universe.take());
    }
}
