use super::{CommError, ExchangePlan, Operation, ReduceOp};

/// The stream of the GPU's primary context that a backend computes on: a `CUstream`, which outlives the exchanges ordered
/// against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComputeStream(u64);

impl ComputeStream {
    /// The legacy default stream, on which LibTorch computes.
    pub const LEGACY_DEFAULT: Self = Self(0);

    /// The stream with this handle.
    pub fn from_raw(stream: u64) -> Self {
        Self(stream)
    }

    /// The stream's handle.
    pub fn as_raw(self) -> u64 {
        self.0
    }
}

/// Exchanges and reductions of buffers in the memory of a GPU, without a detour through host memory.
///
/// They are ordered against the backend's own work by events: an exchange starts when what was queued before it on the
/// backend's stream is done, and what is queued there after [`PendingDeviceExchange::wait`] starts when the exchange is done.
/// The host waits for nothing.
pub trait DeviceCommunicator {
    /// Index of this rank's GPU.
    fn gpu(&self) -> usize;

    /// Starts an All-to-All-v between buffers on the GPU; `plan` counts bytes.
    ///
    /// # Errors
    ///
    /// As [`Communicator::start_all_to_all_v`](super::Communicator::start_all_to_all_v).
    ///
    /// # Safety
    ///
    /// `send` and `recv` are addresses of `plan.send_len` and `plan.recv_len` bytes on the GPU that do not overlap. They
    /// stay allocated, `send` unchanged and `recv` untouched, until the returned exchange was waited for or dropped, and
    /// are then reused only by work that comes after what is queued on `compute`, which is a stream of that GPU.
    unsafe fn start_device_all_to_all_v(
        &self,
        operation: Operation,
        send: u64,
        recv: u64,
        plan: &ExchangePlan,
        compute: ComputeStream,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError>;

    /// Starts to concatenate all ranks' `len` bytes, in rank order, from `send` to `recv`.
    ///
    /// # Errors
    ///
    /// As [`Communicator::all_gather`](super::Communicator::all_gather).
    ///
    /// # Safety
    ///
    /// As [`DeviceCommunicator::start_device_all_to_all_v`], of `len` and `N * len` bytes.
    unsafe fn start_device_all_gather(
        &self,
        operation: Operation,
        send: u64,
        recv: u64,
        len: usize,
        compute: ComputeStream,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError>;

    /// Starts to replace `len` numbers in single precision on the GPU by their combination over ranks.
    ///
    /// All ranks get the same bits, but unlike those of
    /// [`Communicator::all_reduce`](super::Communicator::all_reduce) they are not those of a sum in rank order: the library
    /// chooses the order, by sizes and topology, and takes the same one in every run on the same machines.
    ///
    /// Ranks may start it at different points between collectives of other communicators; what they are about to do is
    /// therefore never compared, so callers have to know that `len` is equal on all ranks.
    ///
    /// # Errors
    ///
    /// As [`Communicator::all_reduce`](super::Communicator::all_reduce).
    ///
    /// # Safety
    ///
    /// `address` is that of `len` numbers on the GPU, aligned for them. They stay allocated and untouched until the returned
    /// reduction was waited for or dropped, and are then reused only by work that comes after what is queued on `compute`.
    unsafe fn start_device_all_reduce(
        &self,
        operation: Operation,
        address: u64,
        len: usize,
        op: ReduceOp,
        compute: ComputeStream,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError>;
}

/// An exchange or reduction on the GPU that was started and not waited for yet. Dropping it waits, too.
pub trait PendingDeviceExchange: Send {
    /// Lets all later work of the backend's stream wait for it.
    ///
    /// # Errors
    ///
    /// The group's failure, if it is known already, also if this exchange was completed before it: NCCL does not tell what was
    /// completed from what was ended. Where a peer is lost later, what was received is garbage and the group's next collective
    /// says so.
    fn wait(self: Box<Self>) -> Result<(), CommError>;
}
