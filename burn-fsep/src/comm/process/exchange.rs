use std::{ops::Range, sync::Arc};

use super::{
    frame::{Data, RoundKey},
    group::Group,
};
use crate::comm::{Block, CommError, ExchangePlan, Operation, PendingExchange, check};

/// An exchange that this rank has sent its part of.
pub(super) struct Exchange {
    pub group: Arc<Group>,
    pub key: RoundKey,
    pub operation: Operation,
    pub data: Data,
    pub plan: ExchangePlan,
    /// Whether the round was collected, or needs to be no more.
    pub is_over: bool,
}

impl PendingExchange for Exchange {
    fn wait(mut self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        check::receive_buffer(self.operation, recv.len(), self.plan.recv_len)?;
        let frames = self.group.collect(self.key, &self.operation.to_string())?;
        self.is_over = true;
        for (peer, frame) in frames.iter().enumerate() {
            match frame {
                Some(frame) => {
                    let mut start = 0;
                    let sent = frame.blocks.iter().map(|&len| {
                        let range = start..start + len as usize;
                        start = range.end;
                        range
                    });
                    self.receive(recv, peer, &frame.payload, sent)?;
                }
                None => self.receive(recv, peer, self.data.bytes(), sends_to(&self.plan, peer).into_iter())?,
            }
        }
        Ok(())
    }
}

impl Exchange {
    /// Copies what `peer` sent to where this rank wants it.
    fn receive(
        &self,
        recv: &mut [u8],
        peer: usize,
        data: &[u8],
        sent: impl Iterator<Item = Range<usize>>,
    ) -> Result<(), CommError> {
        let mut sent = sent.fuse();
        let mut expected = self.plan.recvs.iter().filter(|block| block.peer == peer).fuse();
        loop {
            match (sent.next(), expected.next()) {
                (None, None) => return Ok(()),
                (Some(from), Some(to)) if from.len() == to.len => {
                    recv[to.offset..to.offset + to.len].copy_from_slice(&data[from]);
                }
                (from, to) => return Err(self.mismatch(peer, from.map(|range| range.len()), to)),
            }
        }
    }

    fn mismatch(&self, peer: usize, sent: Option<usize>, expected: Option<&Block>) -> CommError {
        let operation = self.operation;
        let describe = |what: &str, len: Option<usize>| match len {
            Some(len) => format!("{operation}: {what} a block of {len} bytes"),
            None => format!("{operation}: {what} no further block"),
        };
        self.group.fail(CommError::Mismatch {
            sequence: self.key.1,
            rank: self.group.rank,
            operation: describe("expects", expected.map(|block| block.len)),
            peer,
            peer_operation: describe("sends", sent),
        })
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.is_over {
            self.group.abandon(self.key);
        }
    }
}

/// Where in the send buffer the blocks for `peer` are.
pub(super) fn sends_to(plan: &ExchangePlan, peer: usize) -> Vec<Range<usize>> {
    plan.sends.iter().filter(|block| block.peer == peer).map(|block| block.offset..block.offset + block.len).collect()
}
