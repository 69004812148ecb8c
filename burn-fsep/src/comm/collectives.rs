//! The collectives of all engines, made of their exchanges.

use std::{
    borrow::Cow,
    marker::PhantomData,
    ops::{AddAssign, DivAssign, Range},
    sync::Arc,
};

use burn::tensor::Bytes;

use super::{
    Block, CommError, Communicator, ExchangePlan, Operation, PendingExchange, ReduceOp,
    error::invalid_argument,
    operation::{Collective, Stage},
};

/// From this size on (bytes), among three ranks or more, each rank sends the others its part only: nobody sends or
/// receives more than twice the buffer, whatever the world size.
const IN_PARTS: usize = 64 << 10;

/// A number that ranks combine.
pub(crate) trait Number: bytemuck::Pod + Send + Sync + AddAssign + DivAssign + PartialOrd + From<f32> {
    const NAME: &'static str;
}

impl Number for f32 {
    const NAME: &'static str = "f32";
}

impl Number for f64 {
    const NAME: &'static str = "f64";
}

pub(super) fn all_gather<C: Communicator + ?Sized>(
    comm: &C,
    operation: Operation,
    send: &[u8],
    recv: &mut [u8],
) -> Result<(), CommError> {
    let (size, bytes) = (comm.size(), send.len());
    if recv.len() != bytes * size {
        let reason = format!("{bytes} bytes from each of {size} ranks into {}", recv.len());
        return Err(invalid_argument(operation, reason));
    }
    let operation = operation.by(Collective::AllGather { bytes });
    if send.is_empty() {
        return start_all_gather(comm, operation, vec![0u8])?.wait(&mut vec![0; size]);
    }
    start_all_gather(comm, operation, send.to_vec())?.wait(recv)
}

/// Starts to send `data`, which is not empty (of nothing there would be no message, and the ranks would not wait for each
/// other), to all ranks.
fn start_all_gather<C: Communicator + ?Sized, E: bytemuck::NoUninit + Send + Sync>(
    comm: &C,
    operation: Operation,
    data: Vec<E>,
) -> Result<Box<dyn PendingExchange>, CommError> {
    let (size, len) = (comm.size(), size_of_val(data.as_slice()));
    let plan = ExchangePlan {
        sends: (0..size).map(|peer| Block { peer, offset: 0, len }).collect(),
        recvs: (0..size).map(|peer| Block { peer, offset: peer * len, len }).collect(),
        recv_len: size * len,
        send_len: len,
    };
    comm.start_all_to_all_v(operation, Arc::new(Bytes::from_elems(data)), plan)
}

/// Combines all ranks' numbers in rank order: the same bits wherever it is done.
pub(super) fn all_reduce<C: Communicator + ?Sized, F: Number>(
    comm: &C,
    operation: Operation,
    data: &mut [F],
    op: ReduceOp,
) -> Result<(), CommError> {
    if data.is_empty() {
        let operation = operation.by(Collective::AllReduce { op, len: 0, number: F::NAME, stage: Stage::Whole });
        return start_all_gather(comm, operation, vec![0u8])?.wait(&mut vec![0; comm.size()]);
    }
    PendingAllReduce::start(comm, operation, data.to_vec(), op)?.wait_to(comm, data)
}

/// A combination of all ranks' numbers that was started and not waited for yet. Large ones, among three ranks or more, need a
/// second exchange, which the wait starts.
pub(crate) struct PendingAllReduce<F> {
    operation: Operation,
    op: ReduceOp,
    len: usize,
    /// Numbers that this rank combines.
    mine: usize,
    pending: Box<dyn PendingExchange>,
    number: PhantomData<F>,
}

impl<F: Number> PendingAllReduce<F> {
    /// Starts to combine `data`, of which there is some. Collective.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    pub fn start<C: Communicator + ?Sized>(
        comm: &C,
        operation: Operation,
        data: Vec<F>,
        op: ReduceOp,
    ) -> Result<Self, CommError> {
        let (size, rank, len) = (comm.size(), comm.rank(), data.len());
        let stage = |stage| operation.by(Collective::AllReduce { op, len, number: F::NAME, stage });
        let (pending, mine) = if size < 3 || size_of_val(data.as_slice()) < IN_PARTS {
            (start_all_gather(comm, stage(Stage::Whole), data)?, len)
        } else {
            // Each rank combines its part, and all gather the parts: the traffic of a ring.
            let parts = parts(len, size);
            let mine = parts[rank].len();
            let plan = ExchangePlan {
                sends: blocks(size, |peer| parts[peer].clone()),
                recvs: blocks(size, |peer| peer * mine..(peer + 1) * mine),
                recv_len: size * mine,
                send_len: len,
            };
            let send = Arc::new(Bytes::from_elems(data));
            (comm.start_all_to_all_v(stage(Stage::Parts), send, plan.scaled(size_of::<F>()))?, mine)
        };
        Ok(Self { operation, op, len, mine, pending, number: PhantomData })
    }

    /// Waits for the combined numbers. Collective.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    pub fn wait<C: Communicator + ?Sized>(self, comm: &C) -> Result<Vec<F>, CommError> {
        let mut data = vec![F::zeroed(); self.len];
        self.wait_to(comm, &mut data)?;
        Ok(data)
    }

    fn wait_to<C: Communicator + ?Sized>(self, comm: &C, data: &mut [F]) -> Result<(), CommError> {
        let Self { operation, op, len, mine, pending, .. } = self;
        let size = comm.size();
        if mine == len {
            return combine(pending, data, size, op);
        }
        let (parts, unit) = (parts(len, size), size_of::<F>());
        let mut combined = vec![F::zeroed(); mine];
        combine(pending, &mut combined, size, op)?;
        let plan = ExchangePlan {
            sends: blocks(size, |_| 0..mine),
            recvs: blocks(size, |peer| parts[peer].clone()),
            recv_len: len,
            send_len: mine,
        };
        let send = Arc::new(Bytes::from_elems(combined));
        let operation = operation.by(Collective::AllReduce { op, len, number: F::NAME, stage: Stage::Result });
        comm.start_all_to_all_v(operation, send, plan.scaled(unit))?.wait(bytemuck::cast_slice_mut(data))
    }
}

/// Waits for numbers of all `size` ranks and combines them, in rank order, to `out`.
fn combine<F: Number>(
    pending: Box<dyn PendingExchange>,
    out: &mut [F],
    size: usize,
    op: ReduceOp,
) -> Result<(), CommError> {
    pending.wait_for_blocks(&mut |block, bytes| {
        let theirs = numbers(bytes);
        if block.peer == 0 {
            return out.copy_from_slice(&theirs);
        }
        for (a, &b) in out.iter_mut().zip(theirs.iter()) {
            match op {
                ReduceOp::Sum | ReduceOp::Mean => *a += b,
                ReduceOp::Max if b > *a => *a = b,
                ReduceOp::Max => {}
            }
        }
    })?;
    if op == ReduceOp::Mean {
        let ranks = F::from(size as f32);
        out.iter_mut().for_each(|a| *a /= ranks);
    }
    Ok(())
}

/// Bytes as numbers; copied where they are not aligned.
fn numbers<F: Number>(bytes: &[u8]) -> Cow<'_, [F]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(numbers) => Cow::Borrowed(numbers),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}

pub(super) fn broadcast<C: Communicator + ?Sized>(
    comm: &C,
    operation: Operation,
    buffer: &mut [u8],
    root: usize,
) -> Result<(), CommError> {
    let (size, rank, bytes) = (comm.size(), comm.rank(), buffer.len());
    if root >= size {
        return Err(invalid_argument(operation, format!("root {root} is not one of {size} ranks")));
    }
    let mut exchange =
        |stage, send: Range<usize>, sends: &dyn Fn(usize) -> Range<usize>, recvs: &dyn Fn(usize) -> _| {
            let send = buffer[send].to_vec();
            let (sends, recvs) = (blocks(size, sends), blocks(size, recvs));
            let plan = ExchangePlan { sends, recvs, recv_len: bytes, send_len: send.len() };
            let operation = operation.by(Collective::Broadcast { bytes, root, stage });
            comm.start_all_to_all_v(operation, Arc::new(Bytes::from_elems(send)), plan)?.wait(buffer)
        };
    let is_root = rank == root;
    let only = |condition: bool, range: Range<usize>| if condition { range } else { 0..0 };
    let whole = only(is_root, 0..bytes);
    if size < 3 || bytes < IN_PARTS {
        let sends = |peer| only(is_root && peer != root, 0..bytes);
        return exchange(Stage::Whole, whole, &sends, &|peer| only(!is_root && peer == root, 0..bytes));
    }
    // The root sends each other rank a part, and all of them the last one; they pass theirs on to each other.
    let parts = parts(bytes, size);
    let mine = &parts[rank];
    let sends = |peer: usize| only(is_root && peer != root, parts[peer].clone());
    exchange(Stage::Parts, whole, &sends, &|peer| only(!is_root && peer == root, mine.clone()))?;
    let sends = |peer| only(peer != rank && peer != root, 0..mine.len());
    exchange(Stage::Result, mine.clone(), &sends, &|peer| only(!is_root && peer != rank, parts[peer].clone()))
}

/// `len` elements in one part for each rank; those of the last ranks may be empty. Shape `[N]`.
fn parts(len: usize, size: usize) -> Vec<Range<usize>> {
    let part = len.div_ceil(size);
    (0..size).map(|rank| (rank * part).min(len)..((rank + 1) * part).min(len)).collect()
}

/// A block with each rank, where there is anything to send or receive.
fn blocks(size: usize, range: impl Fn(usize) -> Range<usize>) -> Vec<Block> {
    let block = |(peer, range): (usize, Range<usize>)| Block { peer, offset: range.start, len: range.len() };
    (0..size).map(|peer| (peer, range(peer))).filter(|(_, range)| !range.is_empty()).map(block).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::comm::local::{LaunchConfig, launch};

    const OP: Operation = Operation::new("test");

    /// Counts the bytes that a rank sends to others.
    #[derive(Debug)]
    struct Meter {
        inner: Arc<dyn Communicator>,
        sent: AtomicUsize,
    }

    impl Communicator for Meter {
        fn rank(&self) -> usize {
            self.inner.rank()
        }

        fn size(&self) -> usize {
            self.inner.size()
        }

        fn world_rank(&self, rank: usize) -> usize {
            self.inner.world_rank(rank)
        }

        fn start_all_to_all_v(
            &self,
            operation: Operation,
            send: Arc<Bytes>,
            plan: ExchangePlan,
        ) -> Result<Box<dyn PendingExchange>, CommError> {
            let others = plan.sends.iter().filter(|block| block.peer != self.rank());
            self.sent.fetch_add(others.map(|block| block.len).sum(), Ordering::Relaxed);
            self.inner.start_all_to_all_v(operation, send, plan)
        }

        fn abort(&self, reason: &str) {
            self.inner.abort(reason);
        }

        fn failure(&self) -> Option<CommError> {
            self.inner.failure()
        }

        fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
            self.inner.duplicate(name)
        }

        fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<dyn Communicator>, CommError> {
            self.inner.split(name, color, key)
        }
    }

    #[test]
    fn nobody_sends_a_large_buffer_to_each_of_the_others() {
        const RANKS: usize = 8;
        let sent = launch(&LaunchConfig::new(RANKS), |inner| {
            let comm = Meter { inner, sent: AtomicUsize::new(0) };
            let mut buffer = vec![comm.rank() as f32; IN_PARTS / 4 + 5];
            comm.broadcast(OP, bytemuck::cast_slice_mut(&mut buffer), 3)?;
            assert!(buffer.iter().all(|&number| number == 3.0));
            let broadcast = comm.sent.swap(0, Ordering::Relaxed);
            comm.all_reduce(OP, crate::comm::ReduceBuffer::F32(&mut buffer), ReduceOp::Sum)?;
            assert!(buffer.iter().all(|&number| number == 3.0 * RANKS as f32));
            Ok::<_, CommError>([broadcast, comm.sent.into_inner()])
        });
        for sent in sent {
            assert!(sent.unwrap().into_iter().all(|bytes| bytes <= 2 * IN_PARTS));
        }
    }

    #[test]
    fn parts_are_of_all_elements_and_may_be_empty() {
        assert_eq!(parts(5, 4), [0..2, 2..4, 4..5, 5..5]);
        assert_eq!(blocks(4, |rank| parts(5, 4)[rank].clone()).len(), 3);
        for (len, size) in [(0, 3), (1, 1), (100_003, 7)] {
            assert_eq!(parts(len, size).into_iter().map(|part| part.len()).sum::<usize>(), len);
        }
    }
}
