use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use burn::tensor::Bytes;

use super::group::{Deposit, Group, RoundKey};
use crate::comm::{
    CommError, Communicator, ExchangePlan, Operation, PendingExchange, ReduceBuffer, ReduceOp, check, reduction,
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
    group: Arc<Group>,
    rank: usize,
    channels: AtomicUsize,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.depart(self.rank);
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
        let group = Arc::new(Group::new(size, timeout));
        (0..size)
            .map(|rank| Self {
                member: Arc::new(Member { group: group.clone(), rank, channels: AtomicUsize::new(1) }),
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
        self.member.group.depart(self.rank());
    }

    fn next_round(&self) -> RoundKey {
        (self.channel, self.sequence.fetch_add(1, Ordering::Relaxed))
    }

    /// Deposits `payload` and returns all ranks' payloads, in rank order, for as long as `read` runs.
    fn meet<P: Send + Sync + 'static, R>(
        &self,
        operation: Operation,
        signature: String,
        payload: P,
        read: impl FnOnce(&[&P]) -> R,
    ) -> Result<R, CommError> {
        let (key, name) = (self.next_round(), operation.to_string());
        let deposit = Deposit { signature, payload: Box::new(payload) };
        self.member.group.deposit(key, self.rank(), &name, deposit)?;
        let deposits = self.member.group.collect(key, self.rank(), &name)?;
        let payloads: Vec<&P> = deposits.iter().map(|deposit| payload_of(deposit)).collect();
        Ok(read(&payloads))
    }
}

/// Signatures name the kind of a collective, so equal signatures mean equal payload types.
fn payload_of<P: 'static>(deposit: &Deposit) -> &P {
    deposit.payload.downcast_ref().expect("collectives of one signature carry one payload type")
}

fn slices<'a, F>(parts: &[&'a Vec<F>]) -> Vec<&'a [F]> {
    parts.iter().map(|part| part.as_slice()).collect()
}

/// What a rank brings to an All-to-All-v.
struct Exchange {
    send: Arc<Bytes>,
    plan: ExchangePlan,
}

struct PendingLocal {
    member: Arc<Member>,
    key: RoundKey,
    operation: Operation,
    is_collected: bool,
}

impl Drop for PendingLocal {
    fn drop(&mut self) {
        if !self.is_collected {
            self.member.group.forgo(self.key);
        }
    }
}

impl PendingExchange for PendingLocal {
    fn wait(mut self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        let (member, key, operation) = (self.member.clone(), self.key, self.operation);
        self.is_collected = true;
        let deposits = member.group.collect(key, member.rank, &operation.to_string())?;
        let ours = payload_of::<Exchange>(&deposits[member.rank]);
        check::receive_buffer(operation, recv.len(), ours.plan.recv_len)?;
        for (peer, deposit) in deposits.iter().enumerate() {
            let theirs = payload_of::<Exchange>(deposit);
            let sent = theirs.plan.sends.iter().filter(|block| block.peer == member.rank);
            let received = ours.plan.recvs.iter().filter(|block| block.peer == peer);
            let (mut sent, mut received) = (sent.fuse(), received.fuse());
            loop {
                match (sent.next(), received.next()) {
                    (None, None) => break,
                    (Some(from), Some(to)) if from.len == to.len => recv[to.offset..to.offset + to.len]
                        .copy_from_slice(&theirs.send[from.offset..from.offset + from.len]),
                    (from, to) => {
                        let describe = |what: &str, len: Option<usize>| match len {
                            Some(len) => format!("{operation}: {what} a block of {len} bytes"),
                            None => format!("{operation}: {what} no further block"),
                        };
                        return Err(member.group.fail(CommError::Mismatch {
                            sequence: key.1,
                            rank: member.rank,
                            operation: describe("expects", to.map(|block| block.len)),
                            peer,
                            peer_operation: describe("sends", from.map(|block| block.len)),
                        }));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Communicator for LocalCommunicator {
    fn rank(&self) -> usize {
        self.member.rank
    }

    fn size(&self) -> usize {
        self.member.group.size()
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        plan.check(operation, self.size())?;
        check::send_buffer(operation, send.len(), plan.send_len)?;
        let key = self.next_round();
        let deposit =
            Deposit { signature: format!("all-to-all `{operation}`"), payload: Box::new(Exchange { send, plan }) };
        self.member.group.deposit(key, self.rank(), &operation.to_string(), deposit)?;
        Ok(Box::new(PendingLocal { member: self.member.clone(), key, operation, is_collected: false }))
    }

    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        check::gathered(operation, self.size(), send.len(), recv.len())?;
        let signature = format!("all-gather `{operation}` of {} bytes", send.len());
        self.meet(operation, signature, send.to_vec(), |parts| {
            for (to, from) in recv.chunks_exact_mut(send.len().max(1)).zip(parts) {
                to.copy_from_slice(from);
            }
        })
    }

    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError> {
        match buffer {
            ReduceBuffer::F32(data) => {
                let signature = format!("all-reduce {op:?} `{operation}` of {} f32", data.len());
                self.meet(operation, signature, data.to_vec(), |parts| reduction::reduce(&slices(parts), data, op))
            }
            ReduceBuffer::F64(data) => {
                let signature = format!("all-reduce {op:?} `{operation}` of {} f64", data.len());
                self.meet(operation, signature, data.to_vec(), |parts| reduction::reduce(&slices(parts), data, op))
            }
        }
    }

    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError> {
        check::root(operation, self.size(), root)?;
        let signature = format!("broadcast `{operation}` of {} bytes from rank {root}", buffer.len());
        let payload = if self.rank() == root { buffer.to_vec() } else { Vec::new() };
        self.meet(operation, signature, payload, |parts| {
            if self.rank() != root {
                buffer.copy_from_slice(parts[root]);
            }
        })
    }

    fn abort(&self, reason: &str) {
        self.member.group.fail(CommError::PeerFailed {
            rank: self.rank(),
            operation: "abort".into(),
            reason: reason.into(),
            lost: false,
        });
    }

    fn failure(&self) -> Option<CommError> {
        self.member.group.failure()
    }

    fn duplicate(&self, _name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        let channel = self.member.channels.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { member: self.member.clone(), channel, sequence: AtomicU64::new(0) }))
    }
}
