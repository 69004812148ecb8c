use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use burn::tensor::Bytes;

use super::rounds::{Part, RoundKey, Rounds};
use crate::comm::{
    Block, CommError, Communicator, ExchangePlan, Operation, PendingExchange,
    error::check_buffer,
    exchange_plan::{by_peer, match_blocks},
};

/// A rank's handle on a group of threads.
///
/// Peers read each other's buffers where they lie: an exchange copies every block once.
pub struct LocalCommunicator {
    member: Arc<Member>,
    /// Which of the group's communicators this is; equal on all ranks.
    channel: usize,
    sequence: AtomicU64,
}

/// One rank of a group, shared by all communicators of that rank.
struct Member {
    rounds: Arc<Rounds>,
    rank: usize,
    channels: AtomicUsize,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.rounds.leave(self.rank);
    }
}

impl fmt::Debug for LocalCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalCommunicator(rank {} of {}, channel {})", self.rank(), self.size(), self.channel)
    }
}

impl LocalCommunicator {
    /// A group of `size` ranks, one handle each, to be moved to one thread each. A collective that not all ranks
    /// have reached after `timeout` ends in an error on all.
    ///
    /// [`launch`](super::launch()) does this and starts the threads.
    ///
    /// # Panics
    ///
    /// If `size` is 0.
    pub fn group(size: usize, timeout: Duration) -> Vec<Self> {
        assert!(size > 0, "a group needs at least one rank");
        let rounds = Arc::new(Rounds::new(size, timeout));
        (0..size)
            .map(|rank| Self {
                member: Arc::new(Member { rounds: rounds.clone(), rank, channels: AtomicUsize::new(1) }),
                channel: 0,
                sequence: AtomicU64::new(0),
            })
            .collect()
    }

    /// The group of one rank: for training without peers and for inference.
    pub fn single() -> Self {
        let mut ranks = Self::group(1, Duration::from_secs(30));
        ranks.swap_remove(0)
    }

    /// Leaves the group: peers that wait for this rank, now or later, get an error.
    pub(super) fn leave(&self) {
        self.member.rounds.leave(self.rank());
    }
}

/// An exchange that this rank has added its part of.
struct PendingLocal {
    member: Arc<Member>,
    key: RoundKey,
    operation: Operation,
    plan: ExchangePlan,
    /// Whether this rank has waited for the parts.
    is_over: bool,
}

impl PendingExchange for PendingLocal {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        check_buffer(self.operation, "receive", recv.len(), self.plan.recv_len)?;
        self.wait_for_blocks(&mut |block, bytes| recv[block.range()].copy_from_slice(bytes))
    }

    fn wait_for_blocks(mut self: Box<Self>, take: &mut dyn FnMut(Block, &[u8])) -> Result<(), CommError> {
        self.is_over = true;
        let (rounds, rank, operation) = (&self.member.rounds, self.member.rank, self.operation);
        let parts = rounds.wait(self.key, rank, &operation.to_string())?;
        let expected = by_peer(&self.plan.recvs, rounds.size());
        for (peer, (part, expects)) in parts.iter().zip(expected).enumerate() {
            let sent = part.blocks[rank].iter().map(|block| &part.send[block.range()]);
            match_blocks(operation, &expects, sent, take)
                .map_err(|texts| rounds.fail(CommError::mismatch(self.key.1, rank, peer, texts)))?;
        }
        Ok(())
    }
}

impl Drop for PendingLocal {
    fn drop(&mut self) {
        if !self.is_over {
            self.member.rounds.cancel(self.key);
        }
    }
}

impl Communicator for LocalCommunicator {
    fn rank(&self) -> usize {
        self.member.rank
    }

    fn size(&self) -> usize {
        self.member.rounds.size()
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        plan.check(operation, self.size())?;
        check_buffer(operation, "send", send.len(), plan.send_len)?;
        let key = (self.channel, self.sequence.fetch_add(1, Ordering::Relaxed));
        let part = Part { signature: operation.signature(), send, blocks: by_peer(&plan.sends, self.size()) };
        self.member.rounds.add(key, self.rank(), &operation.to_string(), part)?;
        Ok(Box::new(PendingLocal { member: self.member.clone(), key, operation, plan, is_over: false }))
    }

    fn abort(&self, reason: &str) {
        self.member.rounds.fail(CommError::aborted(self.rank(), reason));
    }

    fn failure(&self) -> Option<CommError> {
        self.member.rounds.failure()
    }

    fn duplicate(&self, _name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        let channel = self.member.channels.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { member: self.member.clone(), channel, sequence: AtomicU64::new(0) }))
    }
}
