use std::{
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    sync::{Arc, LazyLock, Weak},
    time::{Duration, Instant},
};

use cudarc::{
    driver::{CudaContext, CudaEvent, CudaStream, DriverError, sys::CUresult},
    nccl::sys::ncclResult_t,
};
use parking_lot::Mutex;

use super::handle::{Fault, Handle, unique_id};
use crate::{
    Timeline,
    comm::{CommError, Communicator, Operation},
};

/// How often the watchdog looks.
const WATCH: Duration = Duration::from_millis(20);
/// How long the control group may take to say which rank was lost, where NCCL noticed first.
const NAMING: Duration = Duration::from_secs(2);

/// What all communicators of a rank share: its GPU, the control group, and the failure that ends all of them.
pub(super) struct Group {
    pub control: Arc<dyn Communicator>,
    pub timeout: Duration,
    pub context: Arc<CudaContext>,
    pub timeline: Option<Timeline>,
    /// The legacy default stream, on which the backend computes.
    pub compute: Arc<CudaStream>,
    handles: Mutex<Vec<Weak<Handle>>>,
    failure: Mutex<Option<CommError>>,
    /// Exchanges on the GPU that nobody has seen the end of.
    outstanding: Mutex<Vec<Outstanding>>,
}

struct Outstanding {
    done: Arc<CudaEvent>,
    operation: Operation,
    since: Instant,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {}, control group {:?}", self.context.ordinal(), self.control)
    }
}

impl Group {
    /// Also starts the watchdog, which ends with the group.
    pub fn new(
        control: Arc<dyn Communicator>,
        context: Arc<CudaContext>,
        timeout: Duration,
        timeline: Option<Timeline>,
    ) -> Result<Arc<Self>, CommError> {
        let operation = Operation::new("GPUs of the ranks");
        let place = [process_number(), context.ordinal() as u64];
        let places = crate::comm::all_gather_u64(control.as_ref(), operation, &place)?;
        if places.chunks_exact(2).filter(|theirs| **theirs == place).count() > 1 {
            // They share the default stream, hence wait for work that another rank can only queue behind their own; and
            // CUDA loads kernels only while none of the process is running.
            let reason = format!(
                "GPU {} is that of several ranks of this process: ranks that are threads need a GPU each; those that share \
                 one, for tests, have to be processes",
                context.ordinal()
            );
            // Ranks that have a GPU of their own would go on.
            control.abort(&reason);
            return Err(engine(operation, reason));
        }
        let group = Arc::new(Self {
            compute: context.default_stream(),
            control,
            timeout,
            context,
            timeline,
            handles: Mutex::default(),
            failure: Mutex::default(),
            outstanding: Mutex::default(),
        });
        let watched = Arc::downgrade(&group);
        let watchdog = std::thread::Builder::new().name("nccl-watchdog".into()).spawn(move || {
            while let Some(group) = watched.upgrade() {
                group.watch();
                drop(group);
                std::thread::sleep(WATCH);
            }
        });
        watchdog.map_err(|error| group.fail(engine(operation, format!("no thread for the watchdog: {error}"))))?;
        Ok(group)
    }

    /// A new NCCL communicator over all ranks. Collective.
    pub fn connect(&self) -> Result<Arc<Handle>, CommError> {
        let operation = Operation::new("connection of NCCL");
        self.check(operation)?;
        let result = || -> Result<Arc<Handle>, CommError> {
            let mut id = [0; 128];
            if self.control.rank() == 0 {
                id = unique_id().map_err(|fault| self.fault(operation, fault))?;
            }
            self.control.broadcast(operation, &mut id, 0)?;
            self.context.bind_to_thread().map_err(|error| self.cuda(operation, error))?;
            let handle = Handle::connect(&id, self.control.size(), self.control.rank(), self.timeout)
                .map_err(|fault| self.fault(operation, fault))?;
            let handle = Arc::new(handle);
            self.handles.lock().push(Arc::downgrade(&handle));
            self.wait_ready(&handle, operation)?;
            Ok(handle)
        };
        result().map_err(|error| self.fail(error))
    }

    /// Waits until NCCL has done, or queued, what it was asked for.
    pub fn wait_ready(&self, handle: &Handle, operation: Operation) -> Result<(), CommError> {
        self.poll(operation, || handle.is_ready().map_err(|fault| self.fault(operation, fault)))
    }

    /// Waits until the GPU has come to an event.
    pub fn wait_event(&self, done: &CudaEvent, operation: Operation) -> Result<(), CommError> {
        self.poll(operation, || done.try_is_complete().map_err(|error| self.cuda(operation, error)))
    }

    fn poll(
        &self,
        operation: Operation,
        mut is_done: impl FnMut() -> Result<bool, CommError>,
    ) -> Result<(), CommError> {
        let start = Instant::now();
        loop {
            if is_done().map_err(|error| self.fail(error))? {
                // Work that was cut short by an abort is done, too.
                return self.check(operation);
            }
            self.check(operation)?;
            let waited = start.elapsed();
            if waited > self.timeout {
                return Err(self.fail(self.timed_out(operation)));
            }
            // Counts take some tens of microseconds; whoever waits longer shall not take a core from others.
            if waited < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Lets the watchdog see to the end of an exchange that the host does not wait for.
    pub fn watch_over(&self, done: Arc<CudaEvent>, operation: Operation) {
        self.outstanding.lock().push(Outstanding { done, operation, since: Instant::now() });
    }

    fn watch(&self) {
        if self.failure.lock().is_some() {
            return;
        }
        if let Some(failure) = self.control.failure() {
            self.end(failure);
            return;
        }
        let mut outstanding = self.outstanding.lock();
        let before = outstanding.len();
        let mut fault = None;
        outstanding.retain(|exchange| match exchange.done.try_is_complete() {
            Ok(is_complete) => !is_complete,
            // Of this thread, or of the process's end: not of the exchange.
            Err(DriverError(CUresult::CUDA_ERROR_INVALID_CONTEXT | CUresult::CUDA_ERROR_DEINITIALIZED)) => true,
            Err(error) => {
                fault.get_or_insert_with(|| self.cuda(exchange.operation, error));
                false
            }
        });
        if outstanding.len() < before
            && let Some(first) = outstanding.first_mut()
        {
            first.since = Instant::now();
        }
        // Exchanges wait for the compute stream, which may be busy with anything: their time counts from when the one before
        // them was seen to be done.
        let late = outstanding.first().filter(|exchange| exchange.since.elapsed() > self.timeout);
        let late = late.map(|exchange| exchange.operation);
        drop(outstanding);
        if let Some(fault) = fault {
            self.fail(fault);
        }
        if let Some(operation) = late {
            self.fail(self.timed_out(operation));
        }
        let handles: Vec<_> = self.handles.lock().iter().filter_map(Weak::upgrade).collect();
        for handle in handles {
            if let Err(Fault::Nccl(error)) = handle.is_ready() {
                self.fail(self.fault(Operation::new("communication on the GPU"), Fault::Nccl(error)));
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
        if let Some(failure) = &*self.failure.lock() {
            return Some(failure.clone());
        }
        let failure = self.control.failure()?;
        self.end(failure.clone());
        Some(failure)
    }

    /// Ends the group on all ranks because of an error of this one; returns the error.
    pub fn fail(&self, error: CommError) -> CommError {
        if self.control.failure().is_none() {
            self.control.abort(&error.to_string());
        }
        self.end(error.clone());
        error
    }

    /// Ends this rank's part.
    fn end(&self, failure: CommError) {
        self.failure.lock().get_or_insert(failure);
        let handles: Vec<_> = self.handles.lock().iter().filter_map(Weak::upgrade).collect();
        // Together: the end of one may wait for the GPU, and so for another one's work, until that is told to end, too.
        std::thread::scope(|scope| {
            for handle in &handles {
                let thread = std::thread::Builder::new().name("nccl-abort".into());
                if thread.spawn_scoped(scope, || handle.abort()).is_err() {
                    handle.abort();
                }
            }
        });
    }

    fn timed_out(&self, operation: Operation) -> CommError {
        // NCCL does not say who is missing.
        CommError::Timeout { operation: operation.to_string(), waited: self.timeout, missing: Vec::new() }
    }

    pub fn fault(&self, operation: Operation, fault: Fault) -> CommError {
        match fault {
            Fault::Aborted => match self.failure() {
                Some(failure) => failure.seen_from(&operation.to_string()),
                None => engine(operation, "the communicator was aborted".into()),
            },
            Fault::Nccl(error) => {
                if matches!(error, ncclResult_t::ncclRemoteError | ncclResult_t::ncclSystemError)
                    && let Some(failure) = self.named_failure()
                {
                    return failure.seen_from(&operation.to_string());
                }
                let reason = match error {
                    ncclResult_t::ncclUnhandledCudaError => "NCCL: a CUDA call failed",
                    ncclResult_t::ncclSystemError => "NCCL: a call of the operating system failed",
                    ncclResult_t::ncclRemoteError => "NCCL: the network failed or another rank was lost",
                    ncclResult_t::ncclInvalidArgument => "NCCL: invalid argument",
                    ncclResult_t::ncclInvalidUsage => {
                        "NCCL: invalid usage (several ranks on one GPU need NCCL 2.30 or later and \
                         NCCL_MULTI_RANK_GPU_ENABLE=1)"
                    }
                    _ => "NCCL: internal error",
                };
                engine(operation, format!("{reason}; NCCL_DEBUG=WARN says more"))
            }
        }
    }

    /// What the control group says of a failure that NCCL cannot name, if it does soon.
    fn named_failure(&self) -> Option<CommError> {
        let start = Instant::now();
        loop {
            let failure = self.control.failure();
            if failure.is_some() || start.elapsed() > NAMING {
                return failure;
            }
            std::thread::sleep(WATCH);
        }
    }

    pub fn cuda(&self, operation: Operation, error: DriverError) -> CommError {
        engine(operation, format!("CUDA: {error}"))
    }
}

pub(super) fn engine(operation: Operation, reason: String) -> CommError {
    CommError::Engine { operation: operation.to_string(), reason }
}

/// A number that this process's ranks share and no other process has. Its id is not that: in containers it is often 1.
fn process_number() -> u64 {
    static NUMBER: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    *NUMBER
}
