use std::sync::Arc;

use burn::tensor::Bytes;

use super::group::{Group, Posted};
use crate::comm::{
    Block, CommError, ExchangePlan, Operation, PendingExchange, error::check_buffer, exchange_plan::by_peer,
    headers::Headers,
};

/// An exchange that this rank has posted its messages of.
pub(super) struct PendingMessages {
    pub group: Arc<Group>,
    pub operation: Operation,
    pub sequence: u64,
    pub data: Arc<Bytes>,
    pub plan: ExchangePlan,
    /// What this rank sends to itself, with the places where it goes.
    pub own: Vec<(Block, Block)>,
    /// What the ranks are about to do, where they compare that.
    pub headers: Option<(Headers, Posted)>,
    pub payload: Posted,
}

impl PendingExchange for PendingMessages {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        check_buffer(self.operation, "receive", recv.len(), self.plan.recv_len)?;
        self.wait_for_blocks(&mut |block, bytes| recv[block.range()].copy_from_slice(bytes))
    }

    fn wait_for_blocks(mut self: Box<Self>, take: &mut dyn FnMut(Block, &[u8])) -> Result<(), CommError> {
        let (group, operation, sequence) = (&self.group, self.operation, self.sequence);
        let (rank, size) = (group.rank(), group.size());
        if let Some((headers, posted)) = &mut self.headers {
            group.wait(operation, sequence, posted)?;
            for (peer, said) in posted.received(size).into_iter().enumerate().filter(|&(peer, _)| peer != rank) {
                if let Some(texts) = headers.difference(peer, said) {
                    return Err(group.control.fail(group.control.mismatch(sequence, peer, texts)));
                }
            }
        }
        group.wait(operation, sequence, &mut self.payload)?;
        let expected = by_peer(&self.plan.recvs, size);
        for (peer, (mut message, expects)) in self.payload.received(size).into_iter().zip(expected).enumerate() {
            if peer == rank {
                self.own.iter().for_each(|(from, to)| take(*to, &self.data[from.range()]));
                continue;
            }
            for block in expects {
                // The whole was as long as it should be.
                let (bytes, rest) = message.split_at(block.len);
                take(block, bytes);
                message = rest;
            }
        }
        Ok(())
    }
}
