use std::sync::Arc;

use burn::tensor::Bytes;

use super::{
    group::Group,
    transfer::{Headers, Transfer},
};
use crate::comm::{CommError, ExchangePlan, Operation, PendingExchange, check};

/// An exchange that this rank has posted its messages of.
pub(super) struct Exchange {
    pub group: Arc<Group>,
    pub operation: Operation,
    pub sequence: u64,
    pub data: Arc<Bytes>,
    pub plan: ExchangePlan,
    pub headers: Option<Headers>,
    pub transfer: Option<Transfer>,
}

impl PendingExchange for Exchange {
    fn wait(mut self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        let operation = self.operation;
        check::receive_buffer(operation, recv.len(), self.plan.recv_len)?;
        // Taken only by this function and by drop.
        let Some(transfer) = &mut self.transfer else { return Ok(()) };
        self.group.wait(operation, self.sequence, transfer, self.headers.as_ref())?;
        for (peer, message) in transfer.received() {
            let mut start = 0;
            for block in self.plan.recvs.iter().filter(|block| block.peer == peer) {
                recv[block.offset..block.offset + block.len].copy_from_slice(&message[start..start + block.len]);
                start += block.len;
            }
        }
        let rank = self.group.control.rank();
        let kept = self.plan.sends.iter().filter(|block| block.peer == rank);
        for (from, to) in kept.zip(self.plan.recvs.iter().filter(|block| block.peer == rank)) {
            recv[to.offset..to.offset + to.len].copy_from_slice(&self.data[from.offset..from.offset + from.len]);
        }
        Ok(())
    }
}

impl Drop for Exchange {
    /// What this rank sends may not have been taken yet, and of an exchange that is given up, peers still send their part:
    /// both go on in the background.
    fn drop(&mut self) {
        if let Some(transfer) = self.transfer.take() {
            self.group.library.release(transfer);
        }
    }
}
