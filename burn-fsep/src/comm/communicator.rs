use std::{fmt, sync::Arc};

use burn::tensor::Bytes;

use super::{Block, CommError, DeviceCommunicator, ExchangePlan, Operation, ReduceBuffer, ReduceOp, collectives};

/// An All-to-All-v that was started and not waited for yet.
pub trait PendingExchange: Send {
    /// Waits until every block has come and writes them into `recv`; what no block covers is left as it is.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn wait(self: Box<Self>, recv: &mut [u8]) -> Result<(), CommError>;

    /// Waits until every block has come and hands each to `take`: in the order of ranks, and of one rank in the plan's.
    ///
    /// # Errors
    ///
    /// Any [`CommError`]; some blocks may have been taken.
    fn wait_for_blocks(self: Box<Self>, take: &mut dyn FnMut(Block, &[u8])) -> Result<(), CommError>;
}

/// A rank's handle on a process group.
///
/// Collectives must be called by all ranks in the same order, each from one thread a rank. A collective either
/// completes on every rank or ends in an error on every rank within the group's timeout: never a hang. After an error
/// the group is spent, and so are all others of the world ([`split`](Communicator::split)): every later call returns the first error
/// again. (On NCCL a rank may get the error of a collective that
/// others completed; see "Errors" in docs/design.md.)
///
/// An engine exchanges, and tells of failures; the other collectives are made of exchanges, once for all engines. A
/// communicator that wraps another passes them on.
pub trait Communicator: Send + Sync + fmt::Debug {
    /// This rank, `0..size`.
    fn rank(&self) -> usize;

    /// World size `N` of the group.
    fn size(&self) -> usize;

    /// The number that the group's rank `rank` has in the world, the group of all ranks that other groups are split off from. Errors
    /// name ranks by it, whichever group they are of.
    ///
    /// # Panics
    ///
    /// If the group has no such rank.
    fn world_rank(&self, rank: usize) -> usize;

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

    /// [`Communicator::duplicate`] for exchanges that compute hides: where it would take the compute's multiprocessors, it takes few.
    ///
    /// # Errors
    ///
    /// As [`Communicator::duplicate`].
    fn duplicate_in_background(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        self.duplicate(name)
    }

    /// Splits the group: ranks that give the same `color` form a group, ranked by `key`, then by their rank here. `name` tells what
    /// it carries, and is equal on all ranks. Collective over this communicator; afterwards, groups know nothing of each other's
    /// collectives, duplicates and splits.
    ///
    /// Their end is one: a rank that aborts, is lost or does not come in one group ends all groups of the world, and errors name it
    /// by its [`world_rank`](Self::world_rank).
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<dyn Communicator>, CommError>;

    /// Exchanges between buffers on this rank's GPU, if the engine has them.
    fn device(&self) -> Option<&dyn DeviceCommunicator> {
        None
    }

    /// Gathers equally long buffers: `recv` is the concatenation of all ranks' `send`.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        collectives::all_gather(self, operation, send, recv)
    }

    /// Combines `buffer` over ranks; all ranks get the same bits.
    ///
    /// # Errors
    ///
    /// Any [`CommError`]; `buffer` may hold anything then.
    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError> {
        match buffer {
            ReduceBuffer::F32(data) => collectives::all_reduce(self, operation, data, op),
            ReduceBuffer::F64(data) => collectives::all_reduce(self, operation, data, op),
        }
    }

    /// Copies rank `root`'s `buffer` to all ranks.
    ///
    /// # Errors
    ///
    /// Any [`CommError`]; `buffer` may hold anything then.
    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError> {
        collectives::broadcast(self, operation, buffer, root)
    }

    /// Waits for all ranks.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    fn barrier(&self, operation: Operation) -> Result<(), CommError> {
        self.all_gather(operation, &[], &mut [])
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
