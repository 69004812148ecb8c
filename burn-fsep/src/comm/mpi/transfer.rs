use std::{mem::ManuallyDrop, ops::Range, sync::Arc};

use burn::tensor::Bytes;

use super::library::{Fault, Mpi, RawComm, Request};
use crate::comm::ExchangePlan;

/// Messages of one exchange from and to this rank.
///
/// It owns what MPI reads and writes. A transfer that is dropped before it is complete, because the group has failed, leaves
/// that memory to MPI for good.
pub(super) struct Transfer {
    receipts: Vec<Receipt>,
    sends: Vec<Request>,
    buffers: ManuallyDrop<Buffers>,
    has_failed: bool,
}

struct Buffers {
    _sent: Arc<Bytes>,
    /// One for each of the receipts.
    received: Vec<Vec<u8>>,
}

/// A message on its way to this rank.
struct Receipt {
    /// Who sends it.
    peer: usize,
    /// `None` once it has come.
    request: Option<Request>,
}

/// What may be wrong with what came.
pub(super) enum TransferError {
    Fault(Fault),
    /// A message of other than the expected length.
    Length {
        /// Who sent it.
        peer: usize,
        /// Bytes.
        expected: usize,
        /// Bytes; `None` if there are more than expected.
        came: Option<usize>,
    },
}

/// Tags of an exchange's headers and of its payload. In the range that every MPI has; that numbers come again does no harm,
/// since messages of one tag keep their order.
pub(super) fn tags(sequence: u64) -> [i32; 2] {
    let tag = (sequence % (1 << 14)) as i32 * 2;
    [tag, tag + 1]
}

impl Transfer {
    /// Posts the messages of an exchange between this rank `rank` and its peers; what it sends itself makes none, and neither
    /// does what is empty.
    pub fn start(
        mpi: &mut Mpi,
        comm: RawComm,
        tag: i32,
        data: Arc<Bytes>,
        plan: &ExchangePlan,
        rank: usize,
        size: usize,
    ) -> Result<Self, Fault> {
        let mut sends: Vec<Vec<Range<usize>>> = vec![Vec::new(); size];
        for block in &plan.sends {
            let runs = &mut sends[block.peer];
            match runs.last_mut() {
                Some(run) if run.end == block.offset => run.end += block.len,
                _ => runs.push(block.range()),
            }
        }
        let mut recvs = vec![0; size];
        plan.recvs.iter().for_each(|block| recvs[block.peer] += block.len);
        let base = data.as_ptr();
        let buffers = ManuallyDrop::new(Buffers { _sent: data, received: Vec::new() });
        let mut transfer = Self { receipts: Vec::new(), sends: Vec::new(), buffers, has_failed: false };
        // Each rank begins with its successor, so that not all send to rank 0 first.
        let peers = || (1..size).map(|step| (rank + step) % size);
        for peer in peers().filter(|&peer| recvs[peer] > 0) {
            // SAFETY: the buffer belongs to the transfer, which keeps it as long as the request needs.
            let request = unsafe { mpi.receive(comm, peer, tag, transfer.buffer(recvs[peer]), recvs[peer])? };
            transfer.receipts.push(Receipt { peer, request: Some(request) });
        }
        for peer in peers().filter(|&peer| !sends[peer].is_empty()) {
            // SAFETY: the caller has checked the plan; the data is shared, hence unchanged, and kept as above.
            let request = unsafe { mpi.send(comm, peer, tag, base, &sends[peer])? };
            transfer.sends.push(request);
        }
        Ok(transfer)
    }

    /// A new buffer for a message.
    fn buffer(&mut self, len: usize) -> *mut u8 {
        let mut buffer = vec![0; len];
        let at = buffer.as_mut_ptr();
        self.buffers.received.push(buffer);
        at
    }

    /// Whether everything has come that is to come to this rank.
    pub fn has_come(&mut self, mpi: &mut Mpi) -> Result<bool, TransferError> {
        let result = self.test_receipts(mpi);
        self.has_failed |= result.is_err();
        result
    }

    fn test_receipts(&mut self, mpi: &mut Mpi) -> Result<bool, TransferError> {
        for (receipt, buffer) in self.receipts.iter_mut().zip(&self.buffers.received) {
            let (peer, expected) = (receipt.peer, buffer.len());
            match receipt.test(mpi) {
                Err(fault) if fault.is_truncated => {
                    return Err(TransferError::Length { peer, expected, came: None });
                }
                Err(fault) => return Err(TransferError::Fault(fault)),
                Ok(came @ Some(len)) if len != expected => return Err(TransferError::Length { peer, expected, came }),
                Ok(_) => {}
            }
        }
        Ok(self.receipts.iter().all(|receipt| receipt.request.is_none()))
    }

    /// The ranks that nothing has come from.
    pub fn missing(&self) -> Vec<usize> {
        let waiting = self.receipts.iter().filter(|receipt| receipt.request.is_some());
        let mut missing: Vec<_> = waiting.map(|receipt| receipt.peer).collect();
        missing.sort_unstable();
        missing
    }

    /// What has come, with its sender. Only after [`has_come`](Self::has_come).
    pub fn received(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let senders = self.receipts.iter().map(|receipt| receipt.peer);
        senders.zip(self.buffers.received.iter().map(|buffer| buffer.as_slice()))
    }

    /// Whether MPI is done with all of it.
    pub fn is_complete(&mut self, mpi: &mut Mpi) -> bool {
        for receipt in &mut self.receipts {
            // A message that nobody wants may be of any length.
            self.has_failed |= receipt.request.is_some() && receipt.test(mpi).is_err();
        }
        self.sends.retain_mut(|request| match mpi.test(request) {
            Ok(bytes) => bytes.is_none(),
            Err(_) => {
                self.has_failed = true;
                false
            }
        });
        self.has_ended()
    }

    /// Whether MPI has reported an error of it.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    fn has_ended(&self) -> bool {
        self.sends.is_empty() && self.receipts.iter().all(|receipt| receipt.request.is_none())
    }
}

impl Receipt {
    /// The bytes of a message that has come just now.
    fn test(&mut self, mpi: &mut Mpi) -> Result<Option<usize>, Fault> {
        let Some(request) = &mut self.request else { return Ok(None) };
        let bytes = mpi.test(request);
        if !matches!(bytes, Ok(None)) {
            self.request = None;
        }
        bytes
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        // After an error, MPI does not say what it still does.
        if self.has_ended() && !self.has_failed {
            // SAFETY: nothing else drops the buffers, and MPI uses them no more.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        }
    }
}
