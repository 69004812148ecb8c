use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use burn::tensor::Bytes;
use burn_fsep::comm::{CommError, Communicator, ExchangePlan, Operation, PendingExchange, ReduceBuffer, ReduceOp};

/// What a faulty rank does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultMode {
    /// It panics.
    Panic,
    /// Its collective returns an error, as if its network had failed.
    Error,
}

/// A fault of one rank at one of its collectives.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// The rank that fails.
    pub rank: usize,
    /// Which of its calls fails, from 0; waiting for an exchange is a call as starting it is.
    pub at: usize,
    /// How.
    pub mode: FaultMode,
}

/// A communicator that fails once.
#[derive(Debug)]
pub struct FaultyCommunicator {
    inner: Arc<dyn Communicator>,
    fault: Fault,
    /// Calls of this rank so far, on all its communicators.
    calls: Arc<AtomicUsize>,
}

impl FaultyCommunicator {
    /// Injects `fault`; the counter tells how many calls the rank made.
    pub fn new(inner: Arc<dyn Communicator>, fault: Fault) -> (Arc<Self>, Arc<AtomicUsize>) {
        let calls = Arc::new(AtomicUsize::new(0));
        (Arc::new(Self { inner, fault, calls: calls.clone() }), calls)
    }

    fn count(&self, operation: Operation) -> Result<(), CommError> {
        count(&self.calls, (self.inner.rank() == self.fault.rank).then_some(self.fault), operation)
    }
}

fn count(calls: &AtomicUsize, fault: Option<Fault>, operation: Operation) -> Result<(), CommError> {
    let call = calls.fetch_add(1, Ordering::Relaxed);
    match fault.filter(|fault| fault.at == call).map(|fault| fault.mode) {
        None => Ok(()),
        Some(FaultMode::Panic) => panic!("injected panic in {operation}"),
        Some(FaultMode::Error) => {
            Err(CommError::InvalidArgument { operation: operation.to_string(), reason: "injected error".into() })
        }
    }
}

/// An exchange of a faulty rank: waiting for it counts as a call of its own.
struct FaultyExchange {
    inner: Box<dyn PendingExchange>,
    fault: Option<Fault>,
    calls: Arc<AtomicUsize>,
    operation: Operation,
}

impl PendingExchange for FaultyExchange {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        count(&self.calls, self.fault, self.operation)?;
        self.inner.wait(recv)
    }
}

impl Communicator for FaultyCommunicator {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        self.count(operation)?;
        Ok(Box::new(FaultyExchange {
            inner: self.inner.start_all_to_all_v(operation, send, plan)?,
            fault: (self.rank() == self.fault.rank).then_some(self.fault),
            calls: self.calls.clone(),
            operation,
        }))
    }

    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        self.count(operation)?;
        self.inner.all_gather(operation, send, recv)
    }

    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError> {
        self.count(operation)?;
        self.inner.all_reduce(operation, buffer, op)
    }

    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError> {
        self.count(operation)?;
        self.inner.broadcast(operation, buffer, root)
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }

    fn failure(&self) -> Option<CommError> {
        self.inner.failure()
    }

    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        let inner = self.inner.duplicate(name)?;
        Ok(Arc::new(Self { inner, fault: self.fault, calls: self.calls.clone() }))
    }
}

/// A communicator that flips the sign of the first number that exchanges of one name bring to rank 0: the negative
/// control of comparisons.
#[derive(Debug)]
pub struct CorruptingCommunicator {
    inner: Arc<dyn Communicator>,
    operation: &'static str,
}

impl CorruptingCommunicator {
    /// Corrupts what the exchanges called `operation` bring.
    pub fn new(inner: Arc<dyn Communicator>, operation: &'static str) -> Self {
        Self { inner, operation }
    }
}

struct CorruptingExchange(Box<dyn PendingExchange>);

impl PendingExchange for CorruptingExchange {
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError> {
        self.0.wait(recv)?;
        // Flips the sign of the first f32.
        if recv.len() >= 4 {
            recv[3] ^= 0x80;
        }
        Ok(())
    }
}

impl Communicator for CorruptingCommunicator {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        let pending = self.inner.start_all_to_all_v(operation, send, plan)?;
        let is_corrupted = operation.name == self.operation && self.rank() == 0;
        Ok(if is_corrupted { Box::new(CorruptingExchange(pending)) } else { pending })
    }

    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        self.inner.all_gather(operation, send, recv)
    }

    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError> {
        self.inner.all_reduce(operation, buffer, op)
    }

    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError> {
        self.inner.broadcast(operation, buffer, root)
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }

    fn failure(&self) -> Option<CommError> {
        self.inner.failure()
    }

    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self { inner: self.inner.duplicate(name)?, operation: self.operation }))
    }
}
