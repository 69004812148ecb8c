use std::{
    mem::MaybeUninit,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use mpi::ffi;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::transfer::Transfer;

/// How often the progress thread calls MPI while something is under way.
const PROGRESS: Duration = Duration::from_micros(50);
/// How often whoever waits for the right to call MPI looks whether it was given up.
const WATCH: Duration = Duration::from_millis(20);
/// Largest part of a datatype: MPI counts in `c_int`.
const PART: usize = 1 << 30;

/// What MPI says of a call.
#[derive(Debug)]
pub(super) struct Fault {
    /// MPI's own text.
    pub reason: String,
    /// A message is longer than its receiver expects.
    pub is_truncated: bool,
}

/// The MPI library of this process, which one thread calls at a time.
pub(super) struct Library {
    mpi: Mutex<Mpi>,
    /// Something is under way, or MPI is over.
    woken: Condvar,
    /// A call that waits for a lost rank may keep the right to call MPI for ever.
    is_given_up: AtomicBool,
}

/// The right to call MPI.
#[derive(Default)]
pub(super) struct Mpi {
    /// Transfers that were started and are not complete.
    outstanding: usize,
    /// Those of them that nobody waits for.
    background: Vec<Transfer>,
    /// No call is allowed any more.
    is_over: bool,
}

/// An operation of MPI that is not complete, or was not tested since.
#[derive(Debug)]
pub(super) struct Request(ffi::MPI_Request);

/// A communicator of MPI.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawComm(pub ffi::MPI_Comm);

// SAFETY: MPI's handles may be used on any thread, one at a time; the lock of `Library` sees to that.
unsafe impl Send for Request {}
// SAFETY: as above.
unsafe impl Send for RawComm {}
// SAFETY: as above; a handle by itself does nothing.
unsafe impl Sync for RawComm {}

impl Request {
    fn start(call: &str, start: impl FnOnce(&mut ffi::MPI_Request) -> i32) -> Result<Self, Fault> {
        // SAFETY: the null request is a constant.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(call, start(&mut request))?;
        Ok(Self(request))
    }
}

impl Library {
    pub fn new() -> Self {
        Self { mpi: Mutex::default(), woken: Condvar::new(), is_given_up: AtomicBool::new(false) }
    }

    /// The right to call MPI; `None` after the end.
    pub fn lock(&self) -> Option<MutexGuard<'_, Mpi>> {
        self.acquire().filter(|mpi| !mpi.is_over)
    }

    /// The same, also after the end; `None` if MPI was given up.
    fn acquire(&self) -> Option<MutexGuard<'_, Mpi>> {
        while !self.is_given_up.load(Ordering::Relaxed) {
            if let Some(mpi) = self.mpi.try_lock_for(WATCH) {
                return Some(mpi);
            }
        }
        None
    }

    /// Allows no further call, and waits for none: one that is under way may never end.
    pub fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    /// Starts a transfer, and has it progress.
    pub fn start(&self, begin: impl FnOnce(&mut Mpi) -> Result<Transfer, Fault>) -> Option<Result<Transfer, Fault>> {
        let mut mpi = self.lock()?;
        let transfer = begin(&mut mpi);
        mpi.outstanding += usize::from(transfer.is_ok());
        drop(mpi);
        self.woken.notify_all();
        Some(transfer)
    }

    /// Nobody waits for a transfer any more.
    pub fn release(&self, mut transfer: Transfer) {
        let Some(mut mpi) = self.lock() else { return };
        if transfer.is_complete(&mut mpi) || transfer.has_failed() {
            mpi.outstanding -= 1;
        } else {
            mpi.background.push(transfer);
        }
    }

    /// Whether nothing is left of the transfers that nobody waits for. Those that somebody holds are not counted: a graph that
    /// is never consumed may hold one for ever.
    pub fn is_drained(&self) -> bool {
        self.lock().is_none_or(|mpi| mpi.background.is_empty())
    }

    /// The progress thread: ends with MPI.
    pub fn progress(&self) {
        let mut mpi = self.mpi.lock();
        while !mpi.is_over {
            if mpi.outstanding == 0 {
                self.woken.wait(&mut mpi);
                continue;
            }
            mpi.advance();
            MutexGuard::unlocked(&mut mpi, || std::thread::sleep(PROGRESS));
        }
    }

    /// Allows no further call; whether none is under way.
    pub fn end(&self) -> bool {
        let mpi = self.acquire().map(|mut mpi| mpi.is_over = true);
        self.woken.notify_all();
        mpi.is_some()
    }
}

impl Mpi {
    /// Lets everything that is under way move on.
    fn advance(&mut self) {
        let mut background = std::mem::take(&mut self.background);
        let before = background.len();
        background.retain_mut(|transfer| !transfer.is_complete(self) && !transfer.has_failed());
        self.outstanding -= before - background.len();
        self.background = background;
        let mut flag = 0;
        // Whatever it finds: a probe is the call that lets MPI work and changes nothing.
        // SAFETY: MPI is initialised and not over; the pointers live through the call.
        unsafe {
            ffi::MPI_Iprobe(
                ffi::RSMPI_ANY_SOURCE,
                ffi::RSMPI_ANY_TAG,
                ffi::RSMPI_COMM_SELF,
                &mut flag,
                ffi::RSMPI_STATUS_IGNORE,
            );
        }
    }

    /// Lets errors come back to the caller instead of ending the process; returns this rank and the number of ranks.
    pub fn setup(&mut self) -> Result<[usize; 2], Fault> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: both communicators exist from MPI's start to its end; the pointers live through the calls.
        unsafe {
            for comm in [ffi::RSMPI_COMM_WORLD, ffi::RSMPI_COMM_SELF] {
                check("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
            }
            check("MPI_Comm_rank", ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank))?;
            check("MPI_Comm_size", ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size))?;
        }
        Ok([rank as usize, size as usize])
    }

    /// Starts to send `runs` of the memory at `base` as one message.
    ///
    /// # Safety
    ///
    /// The runs are readable and stay unchanged until the request is complete.
    pub unsafe fn send(
        &mut self,
        comm: RawComm,
        peer: usize,
        tag: i32,
        base: *const u8,
        runs: &[Range<usize>],
    ) -> Result<Request, Fault> {
        let layout = Layout::of(runs)?;
        // SAFETY: the caller vouches for the memory.
        Request::start("MPI_Isend", |request| unsafe {
            let start = base.add(layout.start).cast();
            ffi::MPI_Isend(start, layout.count, layout.raw, peer as i32, tag, comm.0, request)
        })
    }

    /// Starts to receive a message of at most `len` bytes.
    ///
    /// # Safety
    ///
    /// `to` may be written until the request is complete.
    pub unsafe fn receive(
        &mut self,
        comm: RawComm,
        peer: usize,
        tag: i32,
        to: *mut u8,
        len: usize,
    ) -> Result<Request, Fault> {
        let layout = Layout::of(std::slice::from_ref(&(0..len)))?;
        // SAFETY: the caller vouches for the memory.
        Request::start("MPI_Irecv", |request| unsafe {
            ffi::MPI_Irecv(to.cast(), layout.count, layout.raw, peer as i32, tag, comm.0, request)
        })
    }

    /// Starts to duplicate a communicator.
    ///
    /// # Safety
    ///
    /// `to` may be written until the request is complete.
    pub unsafe fn duplicate(&mut self, comm: RawComm, to: *mut RawComm) -> Result<Request, Fault> {
        // SAFETY: the caller vouches for the memory; a `RawComm` begins with the handle.
        Request::start("MPI_Comm_idup", |request| unsafe { ffi::MPI_Comm_idup(comm.0, &raw mut (*to).0, request) })
    }

    /// Splits a communicator; waits for all its ranks.
    pub fn split(&mut self, comm: RawComm, color: usize, key: usize) -> Result<RawComm, Fault> {
        let mut part = comm;
        // SAFETY: the pointer lives through the call.
        check("MPI_Comm_split", unsafe { ffi::MPI_Comm_split(comm.0, color as i32, key as i32, &mut part.0) })?;
        Ok(part)
    }

    /// Gives up a communicator. Transfers on it that are under way go on.
    pub fn free(&mut self, mut comm: RawComm) {
        // Of all ranks, but MPI expects libraries to do without the others (MPI 4.0, section 7.4.3), so the order in which
        // ranks drop their communicators does not matter.
        // SAFETY: the handle is used no more.
        unsafe { ffi::MPI_Comm_free(&mut comm.0) };
    }

    /// Whether an operation is complete; then the bytes of its message.
    pub fn test(&mut self, request: &mut Request) -> Result<Option<usize>, Fault> {
        let (mut flag, mut status) = (0, MaybeUninit::<ffi::MPI_Status>::zeroed());
        // SAFETY: the request lives; what it reads and writes is vouched for where it is started.
        check("MPI_Test", unsafe { ffi::MPI_Test(&mut request.0, &mut flag, status.as_mut_ptr()) })?;
        if flag == 0 {
            return Ok(None);
        }
        let mut bytes: ffi::MPI_Count = 0;
        // SAFETY: the test has filled the status.
        check("MPI_Get_elements_x", unsafe {
            ffi::MPI_Get_elements_x(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut bytes)
        })?;
        Ok(Some(bytes.max(0) as usize))
    }
}

/// The communicator of all ranks.
pub(super) fn world() -> RawComm {
    // SAFETY: a constant of the library.
    RawComm(unsafe { ffi::RSMPI_COMM_WORLD })
}

/// Where the bytes of a message lie in memory, as MPI describes it.
struct Layout {
    raw: ffi::MPI_Datatype,
    count: i32,
    start: usize,
    is_derived: bool,
}

impl Layout {
    fn of(runs: &[Range<usize>]) -> Result<Self, Fault> {
        // SAFETY: a constant of the library.
        let byte = unsafe { ffi::RSMPI_UINT8_T };
        match runs {
            [] => return Ok(Self { raw: byte, count: 0, start: 0, is_derived: false }),
            [run] if run.len() <= PART => {
                return Ok(Self { raw: byte, count: run.len() as i32, start: run.start, is_derived: false });
            }
            _ => {}
        }
        let parts = || runs.iter().flat_map(|run| run.clone().step_by(PART).map(|at| (at, PART.min(run.end - at))));
        let lengths: Vec<i32> = parts().map(|(_, len)| len as i32).collect();
        let offsets: Vec<ffi::MPI_Aint> = parts().map(|(at, _)| at as ffi::MPI_Aint).collect();
        let mut raw = byte;
        // SAFETY: both arrays have as many entries as is said.
        unsafe {
            check(
                "MPI_Type_create_hindexed",
                ffi::MPI_Type_create_hindexed(lengths.len() as i32, lengths.as_ptr(), offsets.as_ptr(), byte, &mut raw),
            )?;
            check("MPI_Type_commit", ffi::MPI_Type_commit(&mut raw))?;
        }
        Ok(Self { raw, count: 1, start: 0, is_derived: true })
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        if self.is_derived {
            // SAFETY: made above; operations that were started with it keep what they need of it.
            unsafe { ffi::MPI_Type_free(&mut self.raw) };
        }
    }
}

fn check(call: &str, code: i32) -> Result<(), Fault> {
    if code == ffi::MPI_SUCCESS as i32 {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let (mut len, mut class) = (0, 0);
    // SAFETY: the buffer has the size that MPI asks for.
    unsafe {
        ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len);
        ffi::MPI_Error_class(code, &mut class);
    }
    let text = &text[..(len.max(0) as usize).min(text.len())];
    Err(Fault {
        reason: format!("{call}: {}", String::from_utf8_lossy(text)),
        is_truncated: class == ffi::MPI_ERR_TRUNCATE as i32,
    })
}
