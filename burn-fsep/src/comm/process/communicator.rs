use std::{
    borrow::Cow,
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use burn::tensor::Bytes;

use super::{
    RendezvousError,
    exchange::{Exchange, sends_to},
    frame::{Data, Frame, MAX_BLOCKS, MAX_PAYLOAD, MAX_SIGNATURE, Outgoing, RoundKey},
    group::Group,
    link::Links,
};
use crate::comm::{
    CommError, Communicator, ExchangePlan, Operation, PendingExchange, ReduceBuffer, ReduceOp, check, reduction,
};

/// From this size on (bytes) an all-reduce sends each rank its part only.
const REDUCE_IN_PARTS: usize = 64 << 10;

/// A rank's handle on a group of processes. See [`ProcessConfig`](super::ProcessConfig).
pub struct ProcessCommunicator {
    member: Arc<Member>,
    /// Which of the group's communicators this is; equal on all ranks.
    channel: u64,
    sequence: AtomicU64,
}

/// One rank of a group, shared by all communicators of that rank.
struct Member {
    group: Arc<Group>,
    channels: AtomicU64,
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (rank, operation, reason) = (self.group.rank, "abort".into(), "its program panicked".into());
            self.group.fail(CommError::PeerFailed { rank, operation, reason, lost: false });
        }
        self.group.leave();
    }
}

impl fmt::Debug for ProcessCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProcessCommunicator(rank {} of {}, channel {})", self.rank(), self.size(), self.channel)
    }
}

impl ProcessCommunicator {
    pub(super) fn connect(rank: usize, links: Links, timeout: Duration) -> Result<Self, RendezvousError> {
        let member = Member { group: Group::start(rank, links, timeout)?, channels: AtomicU64::new(1) };
        Ok(Self { member: Arc::new(member), channel: 0, sequence: AtomicU64::new(0) })
    }

    /// Leaves the group: peers that wait for this rank, now or later, get an error. Waits, for at most 30 s, until they have
    /// received what was sent to them. Dropping a rank's last communicator does the same.
    pub fn leave(&self) {
        self.member.group.leave();
    }

    fn group(&self) -> &Arc<Group> {
        &self.member.group
    }

    fn next_round(&self) -> RoundKey {
        (self.channel, self.sequence.fetch_add(1, Ordering::Relaxed))
    }

    /// Sends the `ranges` of `data` that are for each peer, and waits for those of the peers.
    fn meet(
        &self,
        operation: Operation,
        signature: String,
        data: &Data,
        ranges: impl Fn(usize) -> Vec<Range<usize>>,
    ) -> Result<Vec<Option<Frame>>, CommError> {
        check_limits(operation, &signature, data.bytes().len(), 0)?;
        let (key, name) = (self.next_round(), operation.to_string());
        let part = |peer| Outgoing::frame(key, &signature, data.clone(), ranges(peer), false);
        self.group().deposit(key, &name, signature.clone(), part)?;
        self.group().collect(key, &name)
    }

    /// As [`meet`](Self::meet), where each rank sends all its data to all others; the payloads in rank order.
    fn gather<'a>(
        &self,
        operation: Operation,
        signature: String,
        send: &'a [u8],
    ) -> Result<Vec<Cow<'a, [u8]>>, CommError> {
        let data = Data::Copied(Arc::new(send.to_vec()));
        let whole = 0..send.len();
        let frames = self.meet(operation, signature, &data, |_| vec![whole.clone()])?;
        let payloads = frames.into_iter().map(|frame| frame.map_or(Cow::Borrowed(send), |f| Cow::Owned(f.payload)));
        let payloads: Vec<_> = payloads.collect();
        self.check_lengths(operation, payloads.iter().map(|payload| payload.len()), send.len())?;
        Ok(payloads)
    }

    /// Signatures name lengths, so these differ only where a peer is broken.
    fn check_lengths(
        &self,
        operation: Operation,
        lengths: impl Iterator<Item = usize>,
        expected: usize,
    ) -> Result<(), CommError> {
        match lengths.enumerate().find(|&(_, len)| len != expected) {
            None => Ok(()),
            Some((peer, len)) => Err(self.group().fail(CommError::Engine {
                operation: operation.to_string(),
                reason: format!("rank {peer} sent {len} bytes where {expected} belong"),
            })),
        }
    }

    fn reduce<F: reduction::Number>(
        &self,
        operation: Operation,
        signature: String,
        buffer: &mut [F],
        op: ReduceOp,
    ) -> Result<(), CommError> {
        let size = self.size();
        if size < 3 || size_of_val(buffer) < REDUCE_IN_PARTS {
            let mine = bytemuck::cast_slice(buffer).to_vec();
            let all = self.gather(operation, signature, &mine)?;
            let all: Vec<Cow<'_, [F]>> = all.iter().map(|bytes| numbers(bytes)).collect();
            reduction::reduce(&all.iter().map(|part| part.as_ref()).collect::<Vec<_>>(), buffer, op);
            return Ok(());
        }
        // Each rank combines its part of the numbers, in rank order, and all gather the parts: the traffic of a ring, and
        // the same bits on every rank and in every run.
        let (len, part) = (buffer.len(), buffer.len().div_ceil(size));
        let part_of = |rank: usize| (rank * part).min(len)..((rank + 1) * part).min(len);
        let bytes_of = |rank: usize| part_of(rank).start * size_of::<F>()..part_of(rank).end * size_of::<F>();
        let rank = self.rank();
        let data = Data::Copied(Arc::new(bytemuck::cast_slice(buffer).to_vec()));
        let frames = self.meet(operation, format!("{signature}, in parts"), &data, |peer| vec![bytes_of(peer)])?;
        let parts = frames.iter().map(|frame| match frame {
            Some(frame) => frame.payload.as_slice(),
            None => &data.bytes()[bytes_of(rank)],
        });
        let parts: Vec<&[u8]> = parts.collect();
        self.check_lengths(operation, parts.iter().map(|part| part.len()), bytes_of(rank).len())?;
        let parts: Vec<Cow<'_, [F]>> = parts.into_iter().map(numbers).collect();
        let mine = &mut buffer[part_of(rank)];
        reduction::reduce(&parts.iter().map(|part| part.as_ref()).collect::<Vec<_>>(), mine, op);

        let data = Data::Copied(Arc::new(bytemuck::cast_slice(mine).to_vec()));
        let whole = 0..data.bytes().len();
        let frames = self.meet(operation, format!("{signature}, result"), &data, |_| vec![whole.clone()])?;
        for (peer, frame) in frames.iter().enumerate() {
            if let Some(frame) = frame {
                self.check_lengths(operation, std::iter::once(frame.payload.len()), bytes_of(peer).len())?;
                buffer[part_of(peer)].copy_from_slice(&numbers(&frame.payload));
            }
        }
        Ok(())
    }
}

/// Received bytes as numbers; copied where they are not aligned.
fn numbers<F: bytemuck::Pod>(bytes: &[u8]) -> Cow<'_, [F]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(numbers) => Cow::Borrowed(numbers),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}

/// Peers refuse what is beyond these limits, so it is refused here, where it can be explained.
fn check_limits(operation: Operation, signature: &str, bytes: usize, blocks: usize) -> Result<(), CommError> {
    for (what, actual, limit) in [
        ("bytes of data", bytes, MAX_PAYLOAD),
        ("blocks", blocks, MAX_BLOCKS),
        ("bytes of description", signature.len(), MAX_SIGNATURE),
    ] {
        if actual > limit {
            let reason = format!("{actual} {what}; at most {limit} fit one message");
            return Err(CommError::InvalidArgument { operation: operation.to_string(), reason });
        }
    }
    Ok(())
}

impl Communicator for ProcessCommunicator {
    fn rank(&self) -> usize {
        self.group().rank
    }

    fn size(&self) -> usize {
        self.group().size
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        plan.check(operation, self.size())?;
        check::send_buffer(operation, send.len(), plan.send_len)?;
        let signature = format!("all-to-all `{operation}`");
        // Blocks may overlap: what is sent is not limited by the buffer's length.
        let sent = plan.sends.iter().map(|block| block.len).sum();
        check_limits(operation, &signature, sent, plan.sends.len())?;
        let (key, data) = (self.next_round(), Data::Sent(send));
        let part = |peer| Outgoing::frame(key, &signature, data.clone(), sends_to(&plan, peer), true);
        self.group().deposit(key, &operation.to_string(), signature.clone(), part)?;
        Ok(Box::new(Exchange { group: self.group().clone(), key, operation, data, plan, is_over: false }))
    }

    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        check::gathered(operation, self.size(), send.len(), recv.len())?;
        let signature = format!("all-gather `{operation}` of {} bytes", send.len());
        let parts = self.gather(operation, signature, send)?;
        for (to, from) in recv.chunks_exact_mut(send.len().max(1)).zip(parts) {
            to.copy_from_slice(&from);
        }
        Ok(())
    }

    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError> {
        match buffer {
            ReduceBuffer::F32(data) => {
                let signature = format!("all-reduce {op:?} `{operation}` of {} f32", data.len());
                self.reduce(operation, signature, data, op)
            }
            ReduceBuffer::F64(data) => {
                let signature = format!("all-reduce {op:?} `{operation}` of {} f64", data.len());
                self.reduce(operation, signature, data, op)
            }
        }
    }

    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError> {
        check::root(operation, self.size(), root)?;
        let signature = format!("broadcast `{operation}` of {} bytes from rank {root}", buffer.len());
        let is_root = self.rank() == root;
        let data = if is_root { Data::Copied(Arc::new(buffer.to_vec())) } else { Data::none() };
        let whole = 0..data.bytes().len();
        // All send, if only their signature: so all know that all take part.
        let frames = self.meet(operation, signature, &data, |_| vec![whole.clone()])?;
        if let Some(frame) = &frames[root] {
            self.check_lengths(operation, std::iter::once(frame.payload.len()), buffer.len())?;
            buffer.copy_from_slice(&frame.payload);
        }
        Ok(())
    }

    fn abort(&self, reason: &str) {
        self.group().fail(CommError::PeerFailed {
            rank: self.rank(),
            operation: "abort".into(),
            reason: reason.into(),
            lost: false,
        });
    }

    fn failure(&self) -> Option<CommError> {
        self.group().failure()
    }

    fn duplicate(&self, _name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        let channel = self.member.channels.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { member: self.member.clone(), channel, sequence: AtomicU64::new(0) }))
    }
}
