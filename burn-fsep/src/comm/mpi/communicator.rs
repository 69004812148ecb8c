use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::Bytes;

use super::{
    exchange::Exchange,
    group::{Group, Handle},
    header::Header,
    transfer::{Headers, Transfer},
};
use crate::comm::{
    Block, CommError, Communicator, ExchangePlan, Operation, PendingExchange, ReduceBuffer, ReduceOp, check, reduction,
};

/// From this size on (bytes) an all-reduce sends each rank its part only.
const REDUCE_IN_PARTS: usize = 64 << 10;

/// A rank's handle on MPI, with a communicator of MPI of its own. See [`MpiConfig`](super::MpiConfig).
pub struct MpiCommunicator {
    group: Arc<Group>,
    handle: Handle,
    /// What it carries.
    name: &'static str,
    sequence: AtomicU64,
}

impl fmt::Debug for MpiCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MpiCommunicator(rank {} of {}, {}, {:?})", self.rank(), self.size(), self.name, self.group)
    }
}

impl MpiCommunicator {
    pub(super) fn connect(group: Arc<Group>, name: &'static str) -> Result<Self, CommError> {
        let handle = group.connect()?;
        Ok(Self { group, handle, name, sequence: AtomicU64::new(0) })
    }

    pub(super) fn group(&self) -> &Group {
        &self.group
    }

    /// What the ranks compare: the collective `text` with these blocks from and to each peer.
    fn headers(&self, text: &str, plan: &ExchangePlan) -> Option<Headers> {
        let headers = |blocks: &[Block]| {
            let of = |peer: usize| Header::new(text, blocks.iter().filter(move |block| block.peer == peer));
            (0..self.size()).map(of).collect()
        };
        self.group.check_signatures.then(|| Headers { sent: headers(&plan.sends), expected: headers(&plan.recvs) })
    }

    /// Posts an exchange whose plan was checked.
    fn start(
        &self,
        operation: Operation,
        text: &str,
        data: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Exchange, CommError> {
        let (headers, ranks) = (self.headers(text, &plan), self.size());
        let mut sends: Vec<Vec<Range<usize>>> = vec![Vec::new(); ranks];
        for block in &plan.sends {
            let runs = &mut sends[block.peer];
            match runs.last_mut() {
                Some(run) if run.end == block.offset => run.end += block.len,
                _ => runs.push(block.offset..block.offset + block.len),
            }
        }
        let mut recvs = vec![0; ranks];
        plan.recvs.iter().for_each(|block| recvs[block.peer] += block.len);
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let place = (self.handle.raw, self.rank(), sequence);
        let transfer = self
            .group
            .start(operation, |mpi| Transfer::exchange(mpi, place, data.clone(), &sends, &recvs, headers.as_ref()))?;
        let (group, transfer) = (self.group.clone(), Some(transfer));
        Ok(Exchange { group, operation, sequence, data, plan, headers, transfer })
    }

    fn run(
        &self,
        operation: Operation,
        text: &str,
        send: &[u8],
        plan: ExchangePlan,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        let data = Arc::new(Bytes::from_elems(send.to_vec()));
        Box::new(self.start(operation, text, data, plan)?).wait(recv)
    }

    /// All ranks' `send`, in rank order.
    fn gather(&self, operation: Operation, text: &str, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        let (ranks, len) = (self.size(), send.len());
        let sends = (0..ranks).map(|peer| Block { peer, offset: 0, len }).collect();
        let recvs = (0..ranks).map(|peer| Block { peer, offset: peer * len, len }).collect();
        self.run(operation, text, send, ExchangePlan { sends, recvs, recv_len: ranks * len, send_len: len }, recv)
    }

    fn reduce<F: reduction::Number>(
        &self,
        operation: Operation,
        text: &str,
        data: &mut [F],
        op: ReduceOp,
    ) -> Result<(), CommError> {
        let (ranks, rank, len) = (self.size(), self.rank(), data.len());
        if ranks < 3 || size_of_val(data) < REDUCE_IN_PARTS {
            let mut all = vec![F::zeroed(); len.max(1) * ranks];
            // Of nothing, one number: the ranks meet all the same.
            let mine = if data.is_empty() { vec![F::zeroed()] } else { data.to_vec() };
            self.gather(operation, text, bytemuck::cast_slice(&mine), bytemuck::cast_slice_mut(&mut all))?;
            if !data.is_empty() {
                reduction::reduce(&all.chunks_exact(len).collect::<Vec<_>>(), data, op);
            }
            return Ok(());
        }
        // Each rank combines its part of the numbers, in rank order, and all gather the parts: the traffic of a ring, and the
        // same bits on every rank and in every run.
        let part = len.div_ceil(ranks);
        let part_of = |rank: usize| (rank * part).min(len)..((rank + 1) * part).min(len);
        let blocks = |block: &dyn Fn(usize) -> Block| (0..ranks).map(block).filter(|block| block.len > 0).collect();
        let mine = part_of(rank);
        let whole: Vec<Block> = blocks(&|peer| Block { peer, offset: part_of(peer).start, len: part_of(peer).len() });
        let parts = blocks(&|peer| Block { peer, offset: peer * mine.len(), len: mine.len() });
        let plan = ExchangePlan { sends: whole.clone(), recvs: parts, recv_len: ranks * mine.len(), send_len: len };
        let mut received = vec![F::zeroed(); ranks * mine.len()];
        let bytes = size_of::<F>();
        let (send, recv) = (bytemuck::cast_slice(data), bytemuck::cast_slice_mut(&mut received));
        self.run(operation, &format!("{text}, in parts"), send, plan.scaled(bytes), recv)?;
        let mut combined = vec![F::zeroed(); mine.len()];
        if !mine.is_empty() {
            reduction::reduce(&received.chunks_exact(mine.len()).collect::<Vec<_>>(), &mut combined, op);
        }
        let sends = blocks(&|peer| Block { peer, offset: 0, len: mine.len() });
        let plan = ExchangePlan { sends, recvs: whole, recv_len: len, send_len: mine.len() };
        let (send, recv) = (bytemuck::cast_slice(&combined), bytemuck::cast_slice_mut(data));
        self.run(operation, &format!("{text}, result"), send, plan.scaled(bytes), recv)
    }
}

impl Communicator for MpiCommunicator {
    fn rank(&self) -> usize {
        self.group.control.rank()
    }

    fn size(&self) -> usize {
        self.group.control.size()
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        plan.check(operation, self.size())?;
        let invalid = |reason| CommError::InvalidArgument { operation: operation.to_string(), reason };
        check::send_buffer(operation, send.len(), plan.send_len)?;
        let kept = |blocks: &[Block]| {
            blocks.iter().filter(|block| block.peer == self.rank()).map(|block| block.len).collect::<Vec<_>>()
        };
        if kept(&plan.sends) != kept(&plan.recvs) {
            return Err(self.group.fail(invalid("what this rank sends itself is not what it receives".into())));
        }
        Ok(Box::new(self.start(operation, &format!("all-to-all `{operation}`"), send, plan)?))
    }

    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        check::gathered(operation, self.size(), send.len(), recv.len())?;
        let text = format!("all-gather `{operation}` of {} bytes", send.len());
        if send.is_empty() {
            // A barrier: one byte, since no bytes make no message.
            return self.gather(operation, &text, &[0], &mut vec![0; self.size()]);
        }
        self.gather(operation, &text, send, recv)
    }

    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError> {
        match buffer {
            ReduceBuffer::F32(data) => {
                self.reduce(operation, &format!("all-reduce {op:?} `{operation}` of {} f32", data.len()), data, op)
            }
            ReduceBuffer::F64(data) => {
                self.reduce(operation, &format!("all-reduce {op:?} `{operation}` of {} f64", data.len()), data, op)
            }
        }
    }

    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError> {
        check::root(operation, self.size(), root)?;
        let text = format!("broadcast `{operation}` of {} bytes from rank {root}", buffer.len());
        let headers = self.headers(&text, &ExchangePlan::default());
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let place = (self.handle.raw, self.rank(), sequence);
        let mut transfer =
            self.group.start(operation, |mpi| Transfer::broadcast(mpi, place, buffer, root, headers.as_ref()))?;
        let result = self.group.wait(operation, sequence, &mut transfer, headers.as_ref());
        if result.is_ok() {
            buffer.copy_from_slice(transfer.broadcasted());
        }
        self.group.library.release(transfer);
        result
    }

    fn abort(&self, reason: &str) {
        let (rank, operation) = (self.rank(), "abort".into());
        if self.group.failure().is_none() {
            self.group.control.abort(reason);
        }
        self.group.fail(CommError::PeerFailed { rank, operation, reason: reason.into(), lost: false });
    }

    fn failure(&self) -> Option<CommError> {
        self.group.failure()
    }

    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self::connect(self.group.clone(), name)?))
    }
}
