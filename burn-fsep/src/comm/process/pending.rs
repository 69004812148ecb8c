use std::sync::Arc;

use burn::tensor::Bytes;

use super::{mailbox::Mailbox, message::RoundKey};
use crate::comm::{
    Block, CommError, ExchangePlan, Operation, PendingExchange,
    error::check_buffer,
    exchange_plan::{by_peer, match_blocks},
};

/// An exchange that this rank has sent its part of.
pub(super) struct PendingFrames {
    pub mailbox: Arc<Mailbox>,
    pub key: RoundKey,
    pub operation: Operation,
    pub data: Arc<Bytes>,
    /// What of `data` this rank sends to itself.
    pub own: Vec<Block>,
    pub plan: ExchangePlan,
    /// Whether all frames have come.
    pub is_over: bool,
}

impl PendingExchange for PendingFrames {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        check_buffer(self.operation, "receive", recv.len(), self.plan.recv_len)?;
        self.wait_for_blocks(&mut |block, bytes| recv[block.range()].copy_from_slice(bytes))
    }

    fn wait_for_blocks(mut self: Box<Self>, take: &mut dyn FnMut(Block, &[u8])) -> Result<(), CommError> {
        let frames = self.mailbox.wait(self.key, &self.operation.to_string())?;
        self.is_over = true;
        let expected = by_peer(&self.plan.recvs, self.mailbox.size);
        for (peer, (frame, expects)) in frames.iter().zip(expected).enumerate() {
            let matched = match frame {
                Some(frame) => match_blocks(self.operation, &expects, frame.parts(), take),
                None => {
                    let own = self.own.iter().map(|block| &self.data[block.range()]);
                    match_blocks(self.operation, &expects, own, take)
                }
            };
            matched
                .map_err(|texts| self.mailbox.fail(CommError::mismatch(self.key.1, self.mailbox.rank, peer, texts)))?;
        }
        Ok(())
    }
}

impl Drop for PendingFrames {
    fn drop(&mut self) {
        if !self.is_over {
            self.mailbox.cancel(self.key);
        }
    }
}
