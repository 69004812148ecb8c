use std::{cell::RefCell, fmt, sync::Arc, time::Duration};

use burn::tensor::Bytes;

use super::{
    bounded::bounded,
    library::{Fault, Library, Mpi, RawComm, world},
    transfer::{Transfer, TransferError},
};
use crate::comm::{
    CommError, Communicator, ExchangePlan, Operation,
    control_group::{ControlGroup, engine_error},
};

/// What all communicators of a rank share: the library, and the control group.
pub(super) struct Group {
    pub control: ControlGroup,
    pub library: Arc<Library>,
    pub check_signatures: bool,
    /// What this group's communicators are duplicates of, where it is not all of MPI's world.
    base: Option<Handle>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.control.fmt(f)
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

/// A transfer that was started. What this rank sends may not have been taken yet when it is dropped, and of an exchange that
/// is given up, peers still send their part: both go on in the background.
pub(super) struct Posted {
    library: Arc<Library>,
    /// `None` only while it is dropped.
    transfer: Option<Transfer>,
}

impl Posted {
    /// What has come, by rank. Only after [`Group::wait`]. Shape `[N]`.
    pub fn received(&self, size: usize) -> Vec<&[u8]> {
        let mut messages: Vec<&[u8]> = vec![&[]; size];
        for (peer, message) in self.transfer.iter().flat_map(Transfer::received) {
            messages[peer] = message;
        }
        messages
    }
}

impl Drop for Posted {
    fn drop(&mut self) {
        if let Some(transfer) = self.transfer.take() {
            self.library.release(transfer);
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
        let control = ControlGroup::new(control, timeout);
        Arc::new(Self { control, library, check_signatures, base: None })
    }

    /// This rank's group in a split; see [`Communicator::split`]. Collective.
    pub fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<Self>, CommError> {
        let operation = Operation::new(name);
        self.control.check(operation)?;
        let control = self.control.split(name, color, key)?;
        // MPI's colors are small numbers: the group's first rank, which no other group has.
        let (color, key) = (control.comm.world_rank(0), control.comm.rank());
        let (library, base) = (self.library.clone(), self.base());
        let call = move || library.lock().map(|mut mpi| mpi.split(base, color, key));
        // MPI has no split that does not wait. All ranks are about to call it, since they have split the control group; if one is
        // lost even so, the thread that waits keeps the right to call MPI.
        let split = bounded(operation, self.control.timeout, || self.control.failure(), call);
        let split = split.map_err(|error| {
            self.library.give_up();
            self.control.fail(error)
        })?;
        let raw = self.started(operation, split)?;
        let base = Some(Handle { raw, library: self.library.clone() });
        Ok(Arc::new(Self { control, library: self.library.clone(), check_signatures: self.check_signatures, base }))
    }

    /// What this group's communicators are duplicates of.
    fn base(&self) -> RawComm {
        self.base.as_ref().map_or_else(world, |handle| handle.raw)
    }

    pub fn rank(&self) -> usize {
        self.control.comm.rank()
    }

    pub fn size(&self) -> usize {
        self.control.comm.size()
    }

    /// A new communicator of MPI over all ranks of the group. Collective.
    pub fn connect(&self) -> Result<Handle, CommError> {
        let operation = Operation::new("connection of MPI");
        self.control.check(operation)?;
        // A box of its own: MPI writes to it until the request is complete, also if this rank does not wait that long.
        let raw = Box::into_raw(Box::new(world()));
        let started = self.library.lock().map(|mut mpi| {
            // SAFETY: the box is freed below, when the request is complete, or never.
            unsafe { mpi.duplicate(self.base(), raw) }
        });
        let mut request = self.started(operation, started)?;
        let is_done = |mpi: &mut Mpi| match mpi.test(&mut request) {
            Ok(bytes) => Ok(bytes.is_some()),
            Err(fault) => Err(engine_error(operation, fault.reason)),
        };
        self.poll(operation, is_done, Vec::new)?;
        // SAFETY: made above, and MPI writes to it no more.
        let raw = *unsafe { Box::from_raw(raw) };
        Ok(Handle { raw, library: self.library.clone() })
    }

    /// Posts the messages of an exchange whose plan was checked.
    pub fn post(
        &self,
        operation: Operation,
        comm: RawComm,
        tag: i32,
        data: Arc<Bytes>,
        plan: &ExchangePlan,
    ) -> Result<Posted, CommError> {
        self.control.check(operation)?;
        let started = self.library.start(|mpi| Transfer::start(mpi, comm, tag, data, plan, self.rank(), self.size()));
        let transfer = Some(self.started(operation, started)?);
        Ok(Posted { library: self.library.clone(), transfer })
    }

    fn started<T>(&self, operation: Operation, started: Option<Result<T, Fault>>) -> Result<T, CommError> {
        match started {
            Some(Ok(started)) => Ok(started),
            Some(Err(fault)) => Err(self.control.fail(engine_error(operation, fault.reason))),
            None => Err(self.control.fail(over(operation))),
        }
    }

    /// Waits until everything has come to this rank.
    pub fn wait(&self, operation: Operation, sequence: u64, posted: &mut Posted) -> Result<(), CommError> {
        let Some(transfer) = &mut posted.transfer else { return Ok(()) };
        // Polled and, between the polls, asked who is missing.
        let transfer = RefCell::new(transfer);
        let has_come = |mpi: &mut Mpi| {
            transfer.borrow_mut().has_come(mpi).map_err(|error| match error {
                TransferError::Fault(fault) => engine_error(operation, fault.reason),
                TransferError::Length { peer, expected, came } => {
                    let sent = came.map_or("more".into(), |bytes| format!("{bytes} bytes"));
                    let texts =
                        [format!("{operation}: expects {expected} bytes in all"), format!("{operation}: sends {sent}")];
                    self.control.mismatch(sequence, peer, texts)
                }
            })
        };
        self.poll(operation, has_come, || transfer.borrow().missing())
    }

    /// Waits until the peers have taken what this rank has sent.
    pub fn drain(&self, operation: Operation) -> Result<(), CommError> {
        self.control.poll(operation, || Ok(self.library.is_drained()), Vec::new)
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
        self.control.poll(operation, step, missing)
    }
}

fn over(operation: Operation) -> CommError {
    engine_error(operation, "MPI has ended: its MpiUniverse was dropped or finalized".into())
}
