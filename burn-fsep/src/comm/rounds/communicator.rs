use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::Bytes;

use super::state::{Part, RoundKey, Rounds};
use crate::{
    burn_compat::panic_message,
    comm::{
        Block, CommError, Communicator, ExchangePlan, Operation, PendingExchange,
        error::check_buffer,
        exchange_plan::{by_peer, match_blocks},
        process::{Links, message, message::Outgoing},
    },
};

/// A rank's handle on a group of threads or of processes that are connected by TCP.
///
/// Threads read each other's buffers where they lie: an exchange copies every block once.
pub struct RoundsCommunicator {
    member: Arc<Member>,
    /// Which of the group's communicators this is; equal on all ranks.
    channel: u64,
    sequence: AtomicU64,
}

/// One rank of a group, shared by all communicators of that rank.
struct Member {
    rounds: Arc<Rounds>,
    rank: usize,
    /// To the other ranks, where they are processes.
    links: Option<Arc<Links>>,
    channels: AtomicU64,
}

impl Member {
    fn leave(&self) {
        self.rounds.leave(self.rank);
        if let Some(links) = &self.links {
            links.leave(|| self.rounds.failure().is_some());
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if self.links.is_some() && std::thread::panicking() {
            self.rounds.fail(CommError::aborted(self.rank, "its program panicked"));
        }
        self.leave();
    }
}

impl fmt::Debug for RoundsCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.member.links.is_some() { "ProcessCommunicator" } else { "LocalCommunicator" };
        write!(f, "{kind}(rank {} of {}, channel {})", self.rank(), self.size(), self.channel)
    }
}

impl RoundsCommunicator {
    pub(in crate::comm) fn new(rounds: Arc<Rounds>, rank: usize, links: Option<Arc<Links>>) -> Self {
        let member = Arc::new(Member { rounds, rank, links, channels: AtomicU64::new(1) });
        Self { member, channel: 0, sequence: AtomicU64::new(0) }
    }

    /// Runs a rank's program, which then leaves the group; its error or panic is what the others are told.
    pub(crate) fn run<T, E: fmt::Display>(
        self: &Arc<Self>,
        program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, E>,
    ) -> std::thread::Result<Result<T, E>> {
        let result = catch_unwind(AssertUnwindSafe(|| program(self.clone())));
        match &result {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => self.abort(&error.to_string()),
            Err(panic) => self.abort(&format!("panicked: {}", panic_message(panic.as_ref()))),
        }
        // Not left to the last handle: autodiff graphs that no backward pass consumed may hold one for ever.
        self.leave();
        result
    }

    /// Leaves the group: peers that wait for this rank, now or later, get an error. Among processes it waits, for at most 30 s,
    /// until they have received what was sent to them. Dropping a rank's last communicator does the same.
    pub fn leave(&self) {
        self.member.leave();
    }

    /// Whether a rank has left in peace: of a failure that it was told later it knows nothing.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        self.member.rounds.has_left(rank)
    }
}

impl Communicator for RoundsCommunicator {
    fn rank(&self) -> usize {
        self.member.rank
    }

    fn size(&self) -> usize {
        self.member.rounds.size
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        plan.check(operation, self.size())?;
        check_buffer(operation, "send", send.len(), plan.send_len)?;
        let part = Part { signature: operation.signature(), data: send, blocks: by_peer(&plan.sends, self.size()) };
        let (rank, rounds, links) = (self.rank(), self.member.rounds.clone(), self.member.links.as_deref());
        links.map_or(Ok(()), |_| message::check_limits(operation, &part))?;
        let key = (self.channel, self.sequence.fetch_add(1, Ordering::Relaxed));
        let frames = links.map(|links| (links, Outgoing::parts(key, &part)));
        rounds.add(key, rank, &operation.to_string(), part, || {
            if let Some((links, frames)) = frames {
                links.send(frames);
            }
        })?;
        Ok(Box::new(PendingRound { rounds, rank, key, operation, plan, is_over: false }))
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

/// An exchange that this rank has added its part of.
struct PendingRound {
    rounds: Arc<Rounds>,
    rank: usize,
    key: RoundKey,
    operation: Operation,
    plan: ExchangePlan,
    /// Whether the parts have come.
    is_over: bool,
}

impl PendingExchange for PendingRound {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        check_buffer(self.operation, "receive", recv.len(), self.plan.recv_len)?;
        self.wait_for_blocks(&mut |block, bytes| recv[block.range()].copy_from_slice(bytes))
    }

    fn wait_for_blocks(mut self: Box<Self>, take: &mut dyn FnMut(Block, &[u8])) -> Result<(), CommError> {
        let parts = self.rounds.wait(self.key, self.rank, &self.operation.to_string())?;
        self.is_over = true;
        for (peer, (part, expects)) in parts.iter().zip(by_peer(&self.plan.recvs, parts.len())).enumerate() {
            match_blocks(self.operation, &expects, part.blocks_for(self.rank), take)
                .map_err(|texts| self.rounds.fail(CommError::mismatch(self.key.1, self.rank, peer, texts)))?;
        }
        Ok(())
    }
}

impl Drop for PendingRound {
    fn drop(&mut self) {
        if !self.is_over {
            self.rounds.cancel(self.key);
        }
    }
}
