use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream};

use super::group::Group;
use crate::comm::{Block, CommError, Operation, PendingDeviceExchange, PendingExchange, check};

/// An All-to-All-v of host memory, through buffers on the GPU.
pub(super) struct StagedExchange {
    pub group: Arc<Group>,
    pub stream: Arc<CudaStream>,
    pub operation: Operation,
    pub done: CudaEvent,
    /// Read by the exchange until it is done.
    pub sent: CudaSlice<u8>,
    pub received: CudaSlice<u8>,
    pub recvs: Vec<Block>,
    pub recv_len: usize,
}

impl PendingExchange for StagedExchange {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        let Self { group, stream, operation, done, sent, received, recvs, recv_len } = *self;
        check::receive_buffer(operation, recv.len(), recv_len)?;
        // Copying waits without a limit, so the exchange must be done before.
        group.wait_event(&done, operation)?;
        drop(sent);
        let cuda = |error| group.cuda(operation, error);
        if recvs.iter().map(|block| block.len).sum::<usize>() == recv_len && recv_len > 0 {
            return stream.memcpy_dtoh(&received.slice(..recv_len), recv).map_err(cuda);
        }
        for block in recvs {
            let range = block.offset..block.offset + block.len;
            stream.memcpy_dtoh(&received.slice(range.clone()), &mut recv[range]).map_err(cuda)?;
        }
        Ok(())
    }
}

/// An All-to-All-v between tensors.
pub(super) struct DeviceExchange {
    pub group: Arc<Group>,
    pub operation: Operation,
    pub done: Option<Arc<CudaEvent>>,
}

impl PendingDeviceExchange for DeviceExchange {
    fn wait(mut self: Box<Self>) -> Result<(), CommError> {
        self.join()?;
        self.group.check(self.operation)
    }
}

impl DeviceExchange {
    fn join(&mut self) -> Result<(), CommError> {
        match self.done.take() {
            Some(done) => self.group.compute.wait(&done).map_err(|error| self.group.cuda(self.operation, error)),
            None => Ok(()),
        }
    }
}

impl Drop for DeviceExchange {
    fn drop(&mut self) {
        // The buffers go back to the backend's allocator next, which reuses them in the order of the compute stream.
        let _ = self.join();
    }
}
