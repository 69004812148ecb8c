use std::{fmt, sync::Arc};

use burn::tensor::Bytes;

use super::{CommError, DeviceCommunicator};

/// What a collective is for: names it in errors and signature checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Operation {
    /// For example `"tokens to experts, forward"`.
    pub name: &'static str,
    /// The FSEP layer that it serves, if it serves one.
    pub layer: Option<usize>,
    /// Which of the layer's passes it belongs to: tells the uses of one layer in one step apart.
    pub pass: Option<u64>,
    /// Fingerprint of the layout that it works under, where no pass has made sure that all ranks have the same.
    pub layout: Option<u64>,
}

impl Operation {
    /// An operation that serves no layer in particular.
    pub const fn new(name: &'static str) -> Self {
        Self { name, layer: None, pass: None, layout: None }
    }

    /// An operation of an FSEP layer.
    pub const fn of_layer(name: &'static str, layer: usize) -> Self {
        Self { name, layer: Some(layer), pass: None, layout: None }
    }

    /// The same operation as part of the layer's `pass`-th training pass.
    pub const fn in_pass(self, pass: u64) -> Self {
        Self { pass: Some(pass), ..self }
    }

    /// The same operation under the layout with this [`fingerprint`](burn_fsep_planner::Layout::fingerprint): ranks with
    /// other layouts find out where signatures are compared.
    pub const fn under_layout(self, fingerprint: u64) -> Self {
        Self { layout: Some(fingerprint), ..self }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if let Some(layer) = self.layer {
            write!(f, " of layer {layer}")?;
        }
        if let Some(pass) = self.pass {
            write!(f, " (pass {pass})")?;
        }
        if let Some(fingerprint) = self.layout {
            write!(f, " (layout {fingerprint:016x})")?;
        }
        Ok(())
    }
}

/// A run of elements exchanged with one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block {
    /// The other rank; may be the own one.
    pub peer: usize,
    /// Where the run starts in the send or receive buffer.
    pub offset: usize,
    /// Its length; never 0.
    pub len: usize,
}

/// Who sends what where in an All-to-All-v.
///
/// Between two ranks, the blocks that one sends and the other receives are matched in their order and have equal
/// lengths. Blocks may lie anywhere in the buffers, so that tokens sorted by expert and whole rows of a shard matrix
/// travel without packing first. Units are those of the caller (rows, elements); see [`ExchangePlan::scaled`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExchangePlan {
    /// What this rank sends.
    pub sends: Vec<Block>,
    /// What this rank receives.
    pub recvs: Vec<Block>,
    /// Length of the receive buffer.
    pub recv_len: usize,
    /// Length of the send buffer.
    pub send_len: usize,
}

impl ExchangePlan {
    /// The same plan in units that are `factor` times smaller, for example from rows to bytes.
    pub fn scaled(&self, factor: usize) -> Self {
        let scale = |blocks: &[Block]| {
            blocks.iter().map(|b| Block { peer: b.peer, offset: b.offset * factor, len: b.len * factor }).collect()
        };
        Self {
            sends: scale(&self.sends),
            recvs: scale(&self.recvs),
            recv_len: self.recv_len * factor,
            send_len: self.send_len * factor,
        }
    }

    /// The plan that brings everything back: backward of an All-to-All-v.
    pub fn reversed(&self) -> Self {
        Self { sends: self.recvs.clone(), recvs: self.sends.clone(), recv_len: self.send_len, send_len: self.recv_len }
    }

    /// Whether the receive buffer equals the send buffer without any communication.
    pub fn is_identity(&self, rank: usize) -> bool {
        self.send_len == self.recv_len
            && self.sends == self.recvs
            && self.sends.iter().all(|block| block.peer == rank)
            && self.sends.iter().map(|block| block.len).sum::<usize>() == self.send_len
    }

    /// Checks that blocks name ranks of the group and lie inside the buffers.
    ///
    /// # Errors
    ///
    /// [`CommError::InvalidArgument`] naming the first block that does not.
    pub fn check(&self, operation: Operation, size: usize) -> Result<(), CommError> {
        for (what, blocks, len) in [("send", &self.sends, self.send_len), ("receive", &self.recvs, self.recv_len)] {
            for block in blocks {
                if block.peer >= size
                    || block.len == 0
                    || block.offset.checked_add(block.len).is_none_or(|end| end > len)
                {
                    return Err(CommError::InvalidArgument {
                        operation: operation.to_string(),
                        reason: format!("{what} {block:?} does not fit {size} ranks and a buffer of {len}"),
                    });
                }
            }
        }
        Ok(())
    }
}

/// How an all-reduce combines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// Sum, in rank order: the same bits on every rank and in every run.
    Sum,
    /// Sum divided by the world size.
    Mean,
    /// Maximum.
    Max,
}

/// Numbers that an all-reduce replaces by their combination over ranks.
#[derive(Debug)]
pub enum ReduceBuffer<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Double precision.
    F64(&'a mut [f64]),
}

/// An All-to-All-v that was started and not waited for yet.
pub trait PendingExchange: Send {
    /// Waits until every block has come and writes them into `recv`; what no block covers is left as it is.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError>;
}

/// A rank's handle on a process group.
///
/// Collectives must be called by all ranks in the same order, each from one thread a rank. A collective either
/// completes on every rank or ends in an error on every rank within the group's timeout: never a hang. After an error
/// the group is spent: every later call returns the first error again.
pub trait Communicator: Send + Sync + fmt::Debug {
    /// This rank, `0..size`.
    fn rank(&self) -> usize;

    /// World size `N` of the group.
    fn size(&self) -> usize;

    /// Starts an All-to-All-v; `plan` counts bytes.
    ///
    /// # Errors
    ///
    /// [`CommError::InvalidArgument`] or the group's first failure.
    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError>;

    /// Gathers equally long buffers: `recv` is the concatenation of all ranks' `send`.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError>;

    /// Combines `buffer` over ranks; all ranks get the same bits.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError>;

    /// Copies rank `root`'s `buffer` to all ranks.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError>;

    /// Waits for all ranks.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn barrier(&self, operation: Operation) -> Result<(), CommError> {
        self.all_gather(operation, &[], &mut [])
    }

    /// Ends the group because this rank cannot go on: every other rank's current or next collective returns
    /// [`CommError::PeerFailed`] with this `reason`.
    fn abort(&self, reason: &str);

    /// The failure that ended the group, if one did.
    fn failure(&self) -> Option<CommError>;

    /// A second communicator over the same ranks with an order of its own, so that (for example) weights and tokens
    /// need not wait for each other. `name` tells what it carries. Collective: all ranks call it in the same order.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError>;

    /// Exchanges between buffers on this rank's GPU, if the engine has them.
    fn device(&self) -> Option<&dyn DeviceCommunicator> {
        None
    }
}

/// All-gathers numbers: the concatenation of all ranks' `values`, which are equally many. Shape `[N * len]`.
///
/// # Errors
///
/// Any [`CommError`].
pub fn all_gather_u64(comm: &dyn Communicator, operation: Operation, values: &[u64]) -> Result<Vec<u64>, CommError> {
    let mut gathered = vec![0u64; values.len() * comm.size()];
    comm.all_gather(operation, bytemuck::cast_slice(values), bytemuck::cast_slice_mut(&mut gathered))?;
    Ok(gathered)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OP: Operation = Operation::new("test");

    #[test]
    fn operations_say_what_they_serve() {
        assert_eq!(OP.to_string(), "test");
        let operation = Operation::of_layer("restore", 3);
        assert_eq!(operation.in_pass(7).to_string(), "restore of layer 3 (pass 7)");
        assert_eq!(operation.under_layout(0xa1b2).to_string(), "restore of layer 3 (layout 000000000000a1b2)");
    }

    #[test]
    fn reversing_twice_changes_nothing() {
        let plan = ExchangePlan {
            sends: vec![Block { peer: 1, offset: 0, len: 3 }],
            recvs: vec![Block { peer: 0, offset: 1, len: 2 }],
            recv_len: 3,
            send_len: 4,
        };
        assert_eq!(plan.reversed().reversed(), plan);
        assert_eq!(plan.scaled(4).sends[0].len, 12);
    }

    #[test]
    fn blocks_outside_the_buffers_are_refused() {
        let block = |peer, offset, len| ExchangePlan {
            sends: vec![Block { peer, offset, len }],
            send_len: 4,
            ..Default::default()
        };
        assert!(block(1, 0, 4).check(OP, 2).is_ok());
        for bad in [block(2, 0, 4), block(0, 1, 4), block(0, 0, 0)] {
            assert!(matches!(bad.check(OP, 2), Err(CommError::InvalidArgument { .. })));
        }
    }
}
