use std::{fmt, mem::ManuallyDrop, sync::Arc, thread::JoinHandle};

use mpi::environment::{Threading, Universe, initialize_with_threading};

use super::{
    MpiCommunicator,
    group::engine,
    library::{Fault, Library},
};
use crate::comm::{CommError, Operation};

const START: Operation = Operation::new("start of MPI");

/// MPI in this process, from its start to its end: a process has one, once.
///
/// Dropped without [`finalize`](Self::finalize), it ends all communication of its communicators but does not finalize MPI,
/// which would wait for ranks that may be lost.
pub struct MpiUniverse {
    pub(super) library: Arc<Library>,
    pub(super) rank: usize,
    pub(super) size: usize,
    universe: ManuallyDrop<Universe>,
    progress: Option<JoinHandle<()>>,
}

impl fmt::Debug for MpiUniverse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MpiUniverse(rank {} of {})", self.rank, self.size)
    }
}

impl MpiUniverse {
    /// Initializes MPI and starts the thread that lets it progress.
    ///
    /// MPI itself ends the process if it cannot start. Without `mpirun` it starts as a job of one rank.
    ///
    /// # Errors
    ///
    /// [`CommError::Engine`] if this process has initialized MPI before, or the library does not allow calls from several
    /// threads, one at a time.
    pub fn init() -> Result<Self, CommError> {
        let failed = |reason: &str| engine(START, reason.into());
        let (universe, threading) = initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| failed("this process has initialized MPI before, which is possible once"))?;
        let universe = ManuallyDrop::new(universe);
        if threading < Threading::Serialized {
            return Err(failed("this MPI library does not let threads take turns (MPI_THREAD_SERIALIZED)"));
        }
        let library = Arc::new(Library::new());
        let place = library.lock().ok_or_else(|| failed("it has ended"))?.setup();
        let [rank, size] = place.map_err(|Fault { reason, .. }| engine(START, reason))?;
        let moved = library.clone();
        let progress = std::thread::Builder::new().name("mpi-progress".into()).spawn(move || moved.progress());
        let progress = progress.map_err(|error| engine(START, format!("no thread for its progress: {error}")))?;
        Ok(Self { library, rank, size, universe, progress: Some(progress) })
    }

    /// Finalizes MPI in peace: waits until all ranks of `comm` have come here and everything that this rank sent was taken.
    /// Collective. Afterwards, `comm` and its duplicates are spent.
    ///
    /// # Errors
    ///
    /// Any [`CommError`], if a rank fails or does not come here in time; MPI is not finalized then, and `mpirun` says that the
    /// process ended improperly.
    pub fn finalize(mut self, comm: &MpiCommunicator) -> Result<(), CommError> {
        comm.close()?;
        let universe = &mut self.universe;
        self.library.end(|| {
            // SAFETY: done once: the library ends once, and nothing else drops it.
            unsafe { ManuallyDrop::drop(universe) }
        });
        Ok(())
    }
}

impl Drop for MpiUniverse {
    fn drop(&mut self) {
        self.library.end(|| {});
        if let Some(progress) = self.progress.take() {
            // It cannot panic.
            let _ = progress.join();
        }
    }
}
