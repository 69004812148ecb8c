use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::Bytes;

use super::{
    group_ranks::GroupRanks,
    round::{Part, RoundKey},
    state::Rounds,
};
use crate::{
    burn_compat::panic_message,
    comm::{
        Block, CommError, Communicator, ExchangePlan, Operation, PendingExchange, all_gather_u64, digest,
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
    /// Whom it connects.
    group: Arc<GroupRanks>,
    /// This rank's place among them.
    rank: usize,
    /// What it carries.
    name: &'static str,
    /// Which of the job's communicators this is; equal on all ranks of the group, and another one than those of other groups.
    channel: u64,
    sequence: AtomicU64,
    /// Communicators that were made from this one.
    children: AtomicU64,
}

/// One rank of a job, shared by all communicators of that rank.
struct Member {
    rounds: Arc<Rounds>,
    /// In the world.
    rank: usize,
    /// To the other ranks, where they are processes.
    links: Option<Arc<Links>>,
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
        write!(f, "{kind}(rank {} of {}, {})", self.rank(), self.size(), self.name)
    }
}

impl RoundsCommunicator {
    /// Rank `rank` of a world of `size` ranks.
    pub(in crate::comm) fn new(rounds: Arc<Rounds>, rank: usize, size: usize, links: Option<Arc<Links>>) -> Self {
        let member = Arc::new(Member { rounds, rank, links });
        Self::on_channel(0, "control", member, Arc::new(GroupRanks::new((0..size).collect())), rank)
    }

    fn on_channel(channel: u64, name: &'static str, member: Arc<Member>, group: Arc<GroupRanks>, rank: usize) -> Self {
        let (sequence, children) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { member, group, rank, name, channel, sequence, children }
    }

    /// The next communicator that is made from this one.
    fn child(&self, name: &'static str, color: u64, group: Arc<GroupRanks>, rank: usize) -> Arc<dyn Communicator> {
        let index = self.children.fetch_add(1, Ordering::Relaxed);
        // What all its ranks know, and no other group shares. Numbers that a rank counts would differ between ranks as soon as
        // their groups make different numbers of communicators.
        let channel = digest(bytemuck::cast_slice(&[self.channel, index, color]));
        Arc::new(Self::on_channel(channel, name, self.member.clone(), group, rank))
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
        self.rank
    }

    fn size(&self) -> usize {
        self.group.len()
    }

    fn world_rank(&self, rank: usize) -> usize {
        self.group.world_rank(rank)
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
        let Member { rounds, rank, links } = &*self.member;
        let links = links.as_deref();
        links.map_or(Ok(()), |_| message::check_limits(operation, &part))?;
        let key = (self.channel, self.sequence.fetch_add(1, Ordering::Relaxed));
        let frames = links.map(|links| (links, Outgoing::parts(key, &part)));
        rounds.add(key, &self.group, *rank, &operation.to_string(), part, || {
            if let Some((links, frames)) = frames {
                links.send(self.group.iter().zip(frames));
            }
        })?;
        let (member, group) = (self.member.clone(), self.group.clone());
        Ok(Box::new(PendingRound {
            rounds: member.rounds.clone(),
            group,
            rank: self.rank,
            key,
            operation,
            plan,
            is_over: false,
        }))
    }

    fn abort(&self, reason: &str) {
        self.member.rounds.fail(CommError::aborted(self.member.rank, reason));
    }

    fn failure(&self) -> Option<CommError> {
        self.member.rounds.failure()
    }

    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(self.child(name, 0, self.group.clone(), self.rank))
    }

    fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<dyn Communicator>, CommError> {
        let given = all_gather_u64(self, Operation::new(name), &[color, key])?;
        let given: Vec<&[u64]> = given.chunks_exact(2).collect();
        let mut ranks: Vec<usize> = (0..self.size()).filter(|&rank| given[rank][0] == color).collect();
        ranks.sort_by_key(|&rank| given[rank][1]);
        let place = ranks.iter().position(|&rank| rank == self.rank).expect("this rank gave its own color");
        let ranks = ranks.into_iter().map(|rank| self.world_rank(rank)).collect();
        Ok(self.child(name, color, Arc::new(GroupRanks::new(ranks)), place))
    }
}

/// An exchange that this rank has added its part of.
struct PendingRound {
    rounds: Arc<Rounds>,
    group: Arc<GroupRanks>,
    /// This rank's place in the group.
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
        let own = self.group.world_rank(self.rank);
        let parts = self.rounds.wait(self.key, own, &self.operation.to_string())?;
        self.is_over = true;
        for (peer, (part, expects)) in parts.iter().zip(by_peer(&self.plan.recvs, parts.len())).enumerate() {
            match_blocks(self.operation, &expects, part.blocks_for(self.rank), take).map_err(|texts| {
                let peer = self.group.world_rank(peer);
                self.rounds.fail(CommError::mismatch(self.key.1, own, peer, texts))
            })?;
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
