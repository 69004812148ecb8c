use std::{mem::ManuallyDrop, ops::Range, sync::Arc};

use burn::tensor::Bytes;

use super::{
    header::{HEADER, Header},
    library::{Fault, Mpi, RawComm, Request},
};

/// Messages of one collective from and to this rank.
///
/// It owns what MPI reads and writes. A transfer that is dropped before it is complete, because the group has failed, leaves
/// that memory to MPI for good.
pub(super) struct Transfer {
    headers: Vec<Receipt>,
    payloads: Vec<Receipt>,
    sends: Vec<Request>,
    buffers: ManuallyDrop<Buffers>,
    has_failed: bool,
}

#[derive(Default)]
struct Buffers {
    _sent: Option<Arc<Bytes>>,
    sent_headers: Vec<Vec<u8>>,
    headers: Vec<Vec<u8>>,
    payloads: Vec<Vec<u8>>,
}

/// A message on its way to this rank.
struct Receipt {
    /// Who sends it, if that is known.
    peer: Option<usize>,
    /// `None` once it has come.
    request: Option<Request>,
}

/// What may be wrong with what came.
pub(super) enum Trouble {
    Fault(Fault),
    /// What this rank expects, who does otherwise, and what that one does.
    Differs([String; 2], usize),
    /// A message of other than the expected length: who sent it, bytes expected, bytes that came (`None`: more).
    Length(usize, usize, Option<usize>),
}

/// Headers of a collective: what this rank does with each peer, and expects of it. Shape `[N]` each.
pub(super) struct Headers {
    pub sent: Vec<Header>,
    pub expected: Vec<Header>,
}

/// Tags of a collective's headers and of its payload. In the range that every MPI has; that numbers come again does no harm,
/// since messages of one tag keep their order.
fn tags(sequence: u64) -> [i32; 2] {
    let tag = (sequence % (1 << 14)) as i32 * 2;
    [tag, tag + 1]
}

impl Transfer {
    fn new(sent: Option<Arc<Bytes>>) -> Self {
        let buffers = ManuallyDrop::new(Buffers { _sent: sent, ..Buffers::default() });
        Self { headers: Vec::new(), payloads: Vec::new(), sends: Vec::new(), buffers, has_failed: false }
    }

    /// Posts all messages of collective `sequence` between this rank `rank` and its peers: `sends[p]` of `data` go to rank `p`,
    /// `recvs[p]` bytes come from it. Lengths of 0 make no message.
    pub fn exchange(
        mpi: &mut Mpi,
        (comm, rank, sequence): (RawComm, usize, u64),
        data: Arc<Bytes>,
        sends: &[Vec<Range<usize>>],
        recvs: &[usize],
        headers: Option<&Headers>,
    ) -> Result<Self, Fault> {
        let base = data.as_ptr();
        let mut transfer = Self::new(Some(data));
        transfer.post_headers(mpi, (comm, rank, sequence), headers)?;
        let tag = tags(sequence)[1];
        // Each rank begins with its successor, so that not all send to rank 0 first.
        let peers = || (1..sends.len()).map(|step| (rank + step) % sends.len());
        for peer in peers().filter(|&peer| recvs[peer] > 0) {
            // SAFETY: the buffer belongs to the transfer, which keeps it as long as the request needs.
            let request = unsafe { mpi.receive(comm, peer, tag, transfer.payload(recvs[peer]), recvs[peer])? };
            transfer.payloads.push(Receipt { peer: Some(peer), request: Some(request) });
        }
        for peer in peers().filter(|&peer| !sends[peer].is_empty()) {
            // SAFETY: the caller has checked the ranges; the data is shared, hence unchanged, and kept as above.
            let request = unsafe { mpi.send(comm, peer, tag, base, &sends[peer])? };
            transfer.sends.push(request);
        }
        Ok(transfer)
    }

    /// As [`exchange`](Self::exchange), but all ranks get the root's `buffer`.
    pub fn broadcast(
        mpi: &mut Mpi,
        (comm, rank, sequence): (RawComm, usize, u64),
        buffer: &[u8],
        root: usize,
        headers: Option<&Headers>,
    ) -> Result<Self, Fault> {
        let mut transfer = Self::new(None);
        transfer.post_headers(mpi, (comm, rank, sequence), headers)?;
        if buffer.is_empty() {
            // The address of an empty `Vec` is MPI_IN_PLACE to Open MPI.
            return Ok(transfer);
        }
        let at = transfer.payload(buffer.len());
        transfer.buffers.payloads[0].copy_from_slice(buffer);
        // SAFETY: the buffer belongs to the transfer, which keeps it as long as the request needs.
        let request = unsafe { mpi.broadcast(comm, at, buffer.len(), root)? };
        if rank == root {
            transfer.sends.push(request);
        } else {
            // From the root by way of any other rank.
            transfer.payloads.push(Receipt { peer: None, request: Some(request) });
        }
        Ok(transfer)
    }

    fn post_headers(
        &mut self,
        mpi: &mut Mpi,
        (comm, rank, sequence): (RawComm, usize, u64),
        headers: Option<&Headers>,
    ) -> Result<(), Fault> {
        let Some(headers) = headers else { return Ok(()) };
        let tag = tags(sequence)[0];
        for (peer, header) in headers.sent.iter().enumerate().filter(|(peer, _)| *peer != rank) {
            let mut buffer = vec![0; HEADER];
            let at = buffer.as_mut_ptr();
            self.buffers.headers.push(buffer);
            // SAFETY: as in `exchange`.
            let request = unsafe { mpi.receive(comm, peer, tag, at, HEADER)? };
            self.headers.push(Receipt { peer: Some(peer), request: Some(request) });
            let encoded = header.encode();
            let at = encoded.as_ptr();
            self.buffers.sent_headers.push(encoded);
            // SAFETY: as in `exchange`.
            let request = unsafe { mpi.send(comm, peer, tag, at, std::slice::from_ref(&(0..HEADER)))? };
            self.sends.push(request);
        }
        Ok(())
    }

    /// A new buffer for a message.
    fn payload(&mut self, len: usize) -> *mut u8 {
        let mut buffer = vec![0; len];
        let at = buffer.as_mut_ptr();
        self.buffers.payloads.push(buffer);
        at
    }

    /// Whether everything has come that is to come to this rank; compares headers on the way.
    pub fn has_come(&mut self, mpi: &mut Mpi, headers: Option<&Headers>) -> Result<bool, Trouble> {
        let result = self.test_receipts(mpi, headers);
        self.has_failed |= result.is_err();
        result
    }

    fn test_receipts(&mut self, mpi: &mut Mpi, headers: Option<&Headers>) -> Result<bool, Trouble> {
        for (receipt, buffer) in self.headers.iter_mut().zip(&self.buffers.headers) {
            if receipt.test(mpi).map_err(Trouble::Fault)?.is_none() {
                continue;
            }
            let (Some(headers), Some(peer)) = (headers, receipt.peer) else { continue };
            if let Some(texts) = headers.expected[peer].difference(&Header::decode(buffer)) {
                return Err(Trouble::Differs(texts, peer));
            }
        }
        if self.headers.iter().any(|receipt| receipt.request.is_some()) {
            return Ok(false);
        }
        for (receipt, buffer) in self.payloads.iter_mut().zip(&self.buffers.payloads) {
            match (receipt.test(mpi), receipt.peer) {
                (Err(fault), Some(peer)) if fault.is_truncated => {
                    return Err(Trouble::Length(peer, buffer.len(), None));
                }
                (Err(fault), _) => return Err(Trouble::Fault(fault)),
                (Ok(Some(len)), Some(peer)) if len != buffer.len() => {
                    return Err(Trouble::Length(peer, buffer.len(), Some(len)));
                }
                _ => {}
            }
        }
        Ok(self.payloads.iter().all(|receipt| receipt.request.is_none()))
    }

    /// The ranks that nothing has come from, as far as is known.
    pub fn missing(&self) -> Vec<usize> {
        let absent = |receipts: &[Receipt]| {
            let waiting = receipts.iter().filter(|receipt| receipt.request.is_some());
            waiting.filter_map(|receipt| receipt.peer).collect::<Vec<_>>()
        };
        let mut missing = absent(&self.headers);
        if missing.is_empty() {
            missing = absent(&self.payloads);
        }
        missing.sort_unstable();
        missing
    }

    /// What has come, with its sender. Only after [`has_come`](Self::has_come).
    pub fn received(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let senders = self.payloads.iter().filter_map(|receipt| receipt.peer);
        senders.zip(self.buffers.payloads.iter().map(|buffer| buffer.as_slice()))
    }

    /// What a broadcast has brought.
    pub fn broadcasted(&self) -> &[u8] {
        self.buffers.payloads.first().map_or(&[], |buffer| buffer)
    }

    /// Whether MPI is done with all of it.
    pub fn is_complete(&mut self, mpi: &mut Mpi) -> bool {
        for receipt in self.headers.iter_mut().chain(&mut self.payloads) {
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
        let mut receipts = self.headers.iter().chain(&self.payloads);
        self.sends.is_empty() && receipts.all(|receipt| receipt.request.is_none())
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
