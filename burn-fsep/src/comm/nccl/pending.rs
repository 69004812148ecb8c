use std::{ops::Range, sync::Arc};

use cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, result::stream, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
};

use super::watchdog::{Group, cuda_error};
use crate::comm::{
    Block, CommError, ComputeStream, Operation, PendingDeviceExchange, PendingExchange, error::check_buffer,
};

/// An All-to-All-v of host memory, through buffers on the GPU.
pub(super) struct StagedExchange {
    pub group: Arc<Group>,
    pub stream: Arc<CudaStream>,
    pub operation: Operation,
    pub done: CudaEvent,
    /// Read by the exchange until it is done.
    pub _sent: CudaSlice<u8>,
    pub received: CudaSlice<u8>,
    pub recvs: Vec<Block>,
    pub recv_len: usize,
}

impl StagedExchange {
    /// Waits for the exchange, since copying waits without a limit.
    fn join(&self) -> Result<(), CommError> {
        self.group.wait_event(&self.done, self.operation)
    }

    /// Copies a part of what has come to the same place of `recv`.
    fn download(&self, part: Range<usize>, recv: &mut [u8]) -> Result<(), CommError> {
        if part.is_empty() {
            return Ok(());
        }
        let copied = self.stream.memcpy_dtoh(&self.received.slice(part.clone()), &mut recv[part]);
        copied.map_err(|error| cuda_error(self.operation, error))
    }
}

impl PendingExchange for StagedExchange {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        check_buffer(self.operation, "receive", recv.len(), self.recv_len)?;
        self.join()?;
        if self.recvs.iter().map(|block| block.len).sum::<usize>() == self.recv_len {
            return self.download(0..self.recv_len, recv);
        }
        self.recvs.iter().try_for_each(|block| self.download(block.range(), recv))
    }

    fn wait_for_blocks(mut self: Box<Self>, take: &mut dyn FnMut(Block, &[u8])) -> Result<(), CommError> {
        let mut recv = vec![0; self.recv_len];
        self.join()?;
        self.download(0..self.recv_len, &mut recv)?;
        self.recvs.sort_by_key(|block| block.peer);
        self.recvs.iter().for_each(|block| take(*block, &recv[block.range()]));
        Ok(())
    }
}

/// An All-to-All-v between tensors.
pub(super) struct DeviceExchange {
    pub group: Arc<Group>,
    pub operation: Operation,
    /// What the backend computes on.
    pub compute: ComputeStream,
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
        let Some(done) = self.done.take() else { return Ok(()) };
        let wait = || {
            self.group.context.bind_to_thread()?;
            // SAFETY: who started the exchange vouched for the stream: it is alive and of this GPU's primary context.
            unsafe { stream::wait_event(self.compute.as_raw() as _, done.cu_event(), CU_EVENT_WAIT_DEFAULT) }
        };
        wait().map_err(|error| cuda_error(self.operation, error))
    }
}

impl Drop for DeviceExchange {
    fn drop(&mut self) {
        // The buffers go back to the backend's allocator next, which reuses them in the order of the compute stream.
        let _ = self.join();
    }
}
