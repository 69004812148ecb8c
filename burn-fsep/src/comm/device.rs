use super::{CommError, ExchangePlan, Operation};

/// Exchanges between buffers in the memory of a GPU, without a detour through host memory.
///
/// They are ordered against the backend's own work by events: the exchange starts when what was queued before it is done,
/// and what is queued after [`PendingDeviceExchange::wait`] starts when the exchange is done. The host waits for nothing.
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
    /// are then reused only by work queued on the legacy default stream.
    unsafe fn start_device_all_to_all_v(
        &self,
        operation: Operation,
        send: u64,
        recv: u64,
        plan: &ExchangePlan,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError>;
}

/// An All-to-All-v on the GPU that was started and not waited for yet. Dropping it waits, too.
pub trait PendingDeviceExchange: Send {
    /// Lets all later work of the default stream wait for the exchange.
    ///
    /// # Errors
    ///
    /// The group's failure, if it is known already: where a peer is lost later, what was received is garbage and the
    /// group's next collective says so.
    fn wait(self: Box<Self>) -> Result<(), CommError>;
}
