use std::{
    cell::RefCell,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    library::{Fault, Library, Mpi, RawComm, world},
    transfer::{Headers, Transfer, Trouble},
};
use crate::comm::{CommError, Communicator, Operation};

/// What all communicators of a rank share: the library, the control group, and the failure that ends all of them.
pub(super) struct Group {
    pub control: Arc<dyn Communicator>,
    pub library: Arc<Library>,
    pub check_signatures: bool,
    pub timeout: Duration,
    failure: Mutex<Option<CommError>>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "control group {:?}", self.control)
    }
}

/// A communicator of MPI, freed with its last user.
pub(super) struct Handle {
    pub raw: RawComm,
    library: Arc<Library>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(mut mpi) = self.library.lock() {
            mpi.free(self.raw);
        }
    }
}

impl Group {
    pub fn new(
        control: Arc<dyn Communicator>,
        library: Arc<Library>,
        timeout: Duration,
        check_signatures: bool,
    ) -> Arc<Self> {
        Arc::new(Self { control, library, check_signatures, timeout, failure: Mutex::default() })
    }

    /// A new communicator of MPI over all ranks. Collective.
    pub fn connect(&self) -> Result<Handle, CommError> {
        let operation = Operation::new("connection of MPI");
        self.check(operation)?;
        // A box of its own: MPI writes to it until the request is complete, also if this rank does not wait that long.
        let raw = Box::into_raw(Box::new(world()));
        let started = self.library.lock().map(|mut mpi| {
            // SAFETY: the box is freed below, when the request is complete, or never.
            unsafe { mpi.duplicate(world(), raw) }
        });
        let mut request = match started {
            Some(Ok(request)) => request,
            Some(Err(fault)) => return Err(self.fail(self.fault(operation, fault))),
            None => return Err(self.fail(over(operation))),
        };
        let is_done = |mpi: &mut Mpi| match mpi.test(&mut request) {
            Ok(bytes) => Ok(bytes.is_some()),
            Err(fault) => Err(self.fault(operation, fault)),
        };
        self.poll(operation, is_done, Vec::new)?;
        // SAFETY: made above, and MPI writes to it no more.
        let raw = *unsafe { Box::from_raw(raw) };
        Ok(Handle { raw, library: self.library.clone() })
    }

    /// Starts a transfer.
    pub fn start(
        &self,
        operation: Operation,
        begin: impl FnOnce(&mut Mpi) -> Result<Transfer, Fault>,
    ) -> Result<Transfer, CommError> {
        self.check(operation)?;
        match self.library.start(begin) {
            Some(Ok(transfer)) => Ok(transfer),
            Some(Err(fault)) => Err(self.fail(self.fault(operation, fault))),
            None => Err(self.fail(over(operation))),
        }
    }

    /// Waits until everything has come to this rank.
    pub fn wait(
        &self,
        operation: Operation,
        sequence: u64,
        transfer: &mut Transfer,
        headers: Option<&Headers>,
    ) -> Result<(), CommError> {
        // Polled and, between the polls, asked who is missing.
        let transfer = RefCell::new(transfer);
        let mismatch = |[operation, peer_operation]: [String; 2], peer| CommError::Mismatch {
            sequence,
            rank: self.control.rank(),
            operation,
            peer,
            peer_operation,
        };
        let has_come = |mpi: &mut Mpi| {
            transfer.borrow_mut().has_come(mpi, headers).map_err(|trouble| match trouble {
                Trouble::Fault(fault) => self.fault(operation, fault),
                Trouble::Differs(texts, peer) => mismatch(texts, peer),
                Trouble::Length(peer, expected, came) => {
                    let sent = came.map_or("more".into(), |bytes| format!("{bytes} bytes"));
                    let expected = format!("{operation}: expects {expected} bytes in all");
                    mismatch([expected, format!("{operation}: sends {sent}")], peer)
                }
            })
        };
        self.poll(operation, has_come, || transfer.borrow().missing())
    }

    /// Waits until the peers have taken what this rank has sent.
    pub fn drain(&self, operation: Operation) -> Result<(), CommError> {
        self.poll_until(operation, || Ok(self.library.is_drained()), Vec::new)
    }

    /// Polls with the right to call MPI.
    fn poll(
        &self,
        operation: Operation,
        mut is_done: impl FnMut(&mut Mpi) -> Result<bool, CommError>,
        missing: impl Fn() -> Vec<usize>,
    ) -> Result<(), CommError> {
        let step = || match self.library.lock() {
            Some(mut mpi) => is_done(&mut mpi),
            None => Err(over(operation)),
        };
        self.poll_until(operation, step, missing)
    }

    fn poll_until(
        &self,
        operation: Operation,
        mut is_done: impl FnMut() -> Result<bool, CommError>,
        missing: impl Fn() -> Vec<usize>,
    ) -> Result<(), CommError> {
        let start = Instant::now();
        loop {
            // First: what has come is taken, whatever has happened to its sender since.
            if is_done().map_err(|error| self.fail(error))? {
                return Ok(());
            }
            self.check(operation)?;
            let waited = start.elapsed();
            if waited > self.timeout {
                let (operation, missing) = (operation.to_string(), missing());
                return Err(self.fail(CommError::Timeout { operation, waited: self.timeout, missing }));
            }
            // Counts take some microseconds; whoever waits longer shall not take a core from others.
            if waited < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// The group's failure as a rank in `operation` sees it.
    pub fn check(&self, operation: Operation) -> Result<(), CommError> {
        match self.failure() {
            Some(failure) => Err(failure.seen_from(&operation.to_string())),
            None => Ok(()),
        }
    }

    pub fn failure(&self) -> Option<CommError> {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            *failure = self.control.failure();
        }
        failure.clone()
    }

    /// Ends the group on all ranks because of an error of this one; returns the error.
    pub fn fail(&self, error: CommError) -> CommError {
        if self.control.failure().is_none() {
            self.control.abort(&error.to_string());
        }
        self.failure.lock().get_or_insert(error.clone());
        error
    }

    fn fault(&self, operation: Operation, fault: Fault) -> CommError {
        engine(operation, fault.reason)
    }
}

fn over(operation: Operation) -> CommError {
    engine(operation, "MPI has ended: its MpiUniverse was dropped or finalized".into())
}

pub(super) fn engine(operation: Operation, reason: String) -> CommError {
    CommError::Engine { operation: operation.to_string(), reason }
}
