//! What all communicators of a rank in a group share, and the thread that ends them when the group fails.

use std::{
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    sync::{
        Arc, LazyLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cudarc::{
    driver::{
        CudaContext, CudaEvent, DriverError,
        sys::{CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, CUresult},
    },
    nccl::sys::ncclResult_t,
};
use parking_lot::Mutex;

use super::{
    handle::{Fault, Handle, unique_id},
    kernel_blocks::KernelBlocks,
};
use crate::{
    Timeline,
    comm::{
        CommError, Operation, all_gather_u64,
        control_group::{ControlGroup, engine_error},
    },
};

/// How often the watchdog looks.
const WATCH: Duration = Duration::from_millis(20);
/// How long the control group may take to say which rank was lost, where NCCL noticed first.
const NAMING: Duration = Duration::from_secs(2);
/// What all communicators of a rank in a group share: its GPU, the control group, and what the watchdog watches.
pub(super) struct Group {
    pub control: ControlGroup,
    pub context: Arc<CudaContext>,
    pub timeline: Option<Timeline>,
    kernel_blocks: KernelBlocks,
    handles: Mutex<Vec<Weak<Handle>>>,
    /// Exchanges on the GPU that nobody has seen the end of.
    outstanding: Mutex<Vec<Outstanding>>,
    /// Whether the group has failed and the communicators were told to end.
    has_ended: AtomicBool,
}

struct Outstanding {
    done: Arc<CudaEvent>,
    operation: Operation,
    since: Instant,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {}, {:?}", self.context.ordinal(), self.control)
    }
}

impl Group {
    /// That of all ranks. Collective.
    pub fn new(
        control: ControlGroup,
        context: Arc<CudaContext>,
        background_ctas: Option<usize>,
        timeline: Option<Timeline>,
    ) -> Result<Arc<Self>, CommError> {
        let operation = Operation::new("GPUs of the ranks");
        let place = [process_number(), context.ordinal() as u64];
        let places = all_gather_u64(control.comm.as_ref(), operation, &place)?;
        if places.chunks_exact(2).filter(|theirs| **theirs == place).count() > 1 {
            // They share the default stream, hence wait for work that another rank can only queue behind their own; and
            // CUDA loads kernels only while none of the process is running.
            let reason = format!(
                "GPU {} is that of several ranks of this process: ranks that are threads need a GPU each; those that share \
                 one, for tests, have to be processes",
                context.ordinal()
            );
            // Ranks that have a GPU of their own would go on.
            return Err(control.fail(engine_error(operation, reason)));
        }
        let multiprocessors = context
            .attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(|error| control.fail(cuda_error(operation, error)))?;
        Self::start(control, context, KernelBlocks::new(multiprocessors.max(0) as usize, background_ctas), timeline)
    }

    /// This rank's group in a split; see [`Communicator::split`](crate::comm::Communicator::split). Collective.
    pub fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<Self>, CommError> {
        self.check(Operation::new(name))?;
        let control = self.control.split(name, color, key).inspect_err(|_| drop(self.failure()))?;
        Self::start(control, self.context.clone(), self.kernel_blocks.of_part(), self.timeline.clone())
    }

    /// Also starts the watchdog, which ends with the group. Each group has its own: where one fails, all end their communicators
    /// at once.
    fn start(
        control: ControlGroup,
        context: Arc<CudaContext>,
        kernel_blocks: KernelBlocks,
        timeline: Option<Timeline>,
    ) -> Result<Arc<Self>, CommError> {
        let group = Arc::new(Self {
            control,
            context,
            timeline,
            kernel_blocks,
            handles: Mutex::default(),
            outstanding: Mutex::default(),
            has_ended: AtomicBool::new(false),
        });
        let watched = Arc::downgrade(&group);
        let watchdog = std::thread::Builder::new().name("nccl-watchdog".into()).spawn(move || {
            while let Some(group) = watched.upgrade() {
                group.watch();
                drop(group);
                std::thread::sleep(WATCH);
            }
        });
        let operation = Operation::new("start of NCCL");
        watchdog
            .map_err(|error| group.fail(engine_error(operation, format!("no thread for the watchdog: {error}"))))?;
        Ok(group)
    }

    pub fn rank(&self) -> usize {
        self.control.comm.rank()
    }

    pub fn size(&self) -> usize {
        self.control.comm.size()
    }

    /// A new NCCL communicator over all ranks of the group, for what compute hides or not. Collective.
    pub fn connect(&self, in_background: bool) -> Result<Arc<Handle>, CommError> {
        let operation = Operation::new("connection of NCCL");
        self.check(operation)?;
        let result = || -> Result<Arc<Handle>, CommError> {
            let mut id = [0; 128];
            if self.rank() == 0 {
                id = unique_id().map_err(|fault| self.fault(operation, fault))?;
            }
            self.control.comm.broadcast(operation, &mut id, 0)?;
            self.context.bind_to_thread().map_err(|error| cuda_error(operation, error))?;
            let blocks = self.kernel_blocks.get(in_background);
            let handle = Handle::connect(&id, self.size(), self.rank(), blocks, self.control.timeout)
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
        self.poll(operation, || done.try_is_complete().map_err(|error| cuda_error(operation, error)))
    }

    fn poll(&self, operation: Operation, is_done: impl FnMut() -> Result<bool, CommError>) -> Result<(), CommError> {
        // NCCL does not say who is missing.
        self.control.poll(operation, is_done, Vec::new).inspect_err(|_| self.end())?;
        // Work that was cut short by an abort is done, too.
        self.check(operation)
    }

    /// Lets the watchdog see to the end of an exchange that the host does not wait for.
    pub fn watch_over(&self, done: Arc<CudaEvent>, operation: Operation) {
        self.outstanding.lock().push(Outstanding { done, operation, since: Instant::now() });
    }

    fn watch(&self) {
        if self.has_ended.load(Ordering::Relaxed) || self.failure().is_some() {
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
                fault.get_or_insert_with(|| cuda_error(exchange.operation, error));
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
        let late = outstanding.first().filter(|exchange| exchange.since.elapsed() > self.control.timeout);
        let late = late.map(|exchange| exchange.operation);
        drop(outstanding);
        if let Some(fault) = fault {
            self.fail(fault);
        }
        if let Some(operation) = late {
            self.fail(self.control.timed_out(operation, Vec::new()));
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
        self.control.check(operation).inspect_err(|_| self.end())
    }

    pub fn failure(&self) -> Option<CommError> {
        self.control.failure().inspect(|_| self.end())
    }

    /// Ends the group on all ranks because of an error of this one; returns the error.
    pub fn fail(&self, error: CommError) -> CommError {
        let error = self.control.fail(error);
        self.end();
        error
    }

    /// Ends this rank's part of a group that has failed.
    fn end(&self) {
        self.has_ended.store(true, Ordering::Relaxed);
        // Not kept: each is told once.
        let handles: Vec<_> = self.handles.lock().drain(..).filter_map(|handle| handle.upgrade()).collect();
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

    pub fn fault(&self, operation: Operation, fault: Fault) -> CommError {
        match fault {
            Fault::Aborted => match self.failure() {
                Some(failure) => failure.seen_from(&operation.to_string()),
                None => engine_error(operation, "the communicator was aborted".into()),
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
                engine_error(operation, format!("{reason}; NCCL_DEBUG=WARN says more"))
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
}

pub(super) fn cuda_error(operation: Operation, error: DriverError) -> CommError {
    engine_error(operation, format!("CUDA: {error}"))
}

/// A number that this process's ranks share and no other process has. Its id is not that: in containers it is often 1.
fn process_number() -> u64 {
    static NUMBER: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    *NUMBER
}
