use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use burn::tensor::Bytes;
use burn_fsep::comm::{
    Block, CommError, Communicator, ExchangePlan, Operation, PendingExchange, ReduceBuffer, ReduceOp,
};

/// What a faulty rank does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultMode {
    /// It panics.
    Panic,
    /// Its collective returns an error, as if its network had failed.
    Error,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// One rank fails at one of its collectives.
    Failure {
        /// The rank that fails.
        rank: usize,
        /// Which of its calls fails, from 0; waiting for an exchange is a call as starting it is.
        at: usize,
        /// How.
        mode: FaultMode,
    },
    /// The first number that exchanges of this name bring to rank 0 changes its sign: the negative control of comparisons.
    Corruption(&'static str),
    /// Nothing.
    None,
}

/// What a rank has done, on all its communicators.
#[derive(Debug, Default)]
pub struct CallRecord {
    /// Calls, as [`Fault::Failure`] counts them.
    pub made: AtomicUsize,
    /// Bytes of the largest broadcast.
    pub largest_broadcast: AtomicUsize,
    /// Bytes that exchanges and gathers of each name have sent to other ranks.
    pub sent: Mutex<BTreeMap<&'static str, usize>>,
}

/// A communicator with a fault, which also keeps a record of calls.
#[derive(Debug)]
pub struct FaultyCommunicator {
    inner: Arc<dyn Communicator>,
    calls: Calls,
}

impl FaultyCommunicator {
    /// Injects `fault`; the record tells what the rank did.
    pub fn new(inner: Arc<dyn Communicator>, fault: Fault) -> (Arc<Self>, Arc<CallRecord>) {
        let calls = Calls { rank: inner.rank(), fault, record: Arc::default() };
        let record = calls.record.clone();
        (Arc::new(Self { inner, calls }), record)
    }
}

/// Calls of a rank so far, on all its communicators, and what goes wrong in one.
#[derive(Debug, Clone)]
struct Calls {
    rank: usize,
    fault: Fault,
    record: Arc<CallRecord>,
}

impl Calls {
    fn sent(&self, operation: Operation, bytes: usize) {
        *self.record.sent.lock().expect("no panic while it is held").entry(operation.name).or_default() += bytes;
    }

    fn count(&self, operation: Operation) -> Result<(), CommError> {
        let call = self.record.made.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Fault::Failure { rank, at, mode } if (rank, at) == (self.rank, call) => match mode {
                FaultMode::Panic => panic!("injected panic in {operation}"),
                FaultMode::Error => Err(CommError::InvalidArgument {
                    operation: operation.to_string(),
                    reason: "injected error".into(),
                }),
            },
            _ => Ok(()),
        }
    }
}

/// An exchange with a fault: waiting for it counts as a call of its own.
struct FaultyExchange {
    inner: Box<dyn PendingExchange>,
    calls: Calls,
    operation: Operation,
}

impl PendingExchange for FaultyExchange {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        let Self { inner, calls, operation } = *self;
        calls.count(operation)?;
        inner.wait(recv)?;
        let is_corrupted = matches!(calls.fault, Fault::Corruption(name) if name == operation.name);
        if is_corrupted && calls.rank == 0 && recv.len() >= 4 {
            // The sign of the first f32.
            recv[3] ^= 0x80;
        }
        Ok(())
    }

    /// Of collectives that are made of exchanges, which are not those of [`Fault::Corruption`].
    fn wait_for_blocks(self: Box<Self>, take: &mut dyn FnMut(Block, &[u8])) -> Result<(), CommError> {
        self.calls.count(self.operation)?;
        self.inner.wait_for_blocks(take)
    }
}

impl Communicator for FaultyCommunicator {
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
        self.calls.count(operation)?;
        let to_others = plan.sends.iter().filter(|block| block.peer != self.rank());
        self.calls.sent(operation, to_others.map(|block| block.len).sum());
        let inner = self.inner.start_all_to_all_v(operation, send, plan)?;
        Ok(Box::new(FaultyExchange { inner, calls: self.calls.clone(), operation }))
    }

    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        self.calls.count(operation)?;
        self.calls.sent(operation, send.len() * (self.size() - 1));
        self.inner.all_gather(operation, send, recv)
    }

    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError> {
        self.calls.count(operation)?;
        self.inner.all_reduce(operation, buffer, op)
    }

    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError> {
        self.calls.count(operation)?;
        self.calls.record.largest_broadcast.fetch_max(buffer.len(), Ordering::Relaxed);
        self.inner.broadcast(operation, buffer, root)
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }

    fn failure(&self) -> Option<CommError> {
        self.inner.failure()
    }

    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self { inner: self.inner.duplicate(name)?, calls: self.calls.clone() }))
    }

    fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<dyn Communicator>, CommError> {
        self.calls.count(Operation::new(name))?;
        Ok(Arc::new(Self { inner: self.inner.split(name, color, key)?, calls: self.calls.clone() }))
    }
}
