use std::sync::Arc;

use burn::tensor::Bytes;
use burn_fsep_planner::RoutingCounts;

use crate::{
    FsepError,
    comm::{Block, Communicator, ExchangePlan, Operation, PendingExchange},
    ops::Tracked,
};

/// The assignments of each expert in one pass, on all ranks: what the ranks that share the experts have of them is known with the
/// pass's counts, the other groups' numbers are under way while the experts compute.
pub(crate) struct ExpertLoads {
    /// Of this rank's group. Shape `[E]`
    ours: Vec<u64>,
    pending: Option<Pending>,
}

struct Pending {
    exchange: Box<dyn PendingExchange>,
    replicas: Arc<dyn Communicator>,
    /// Which gradients this rank wants: the others wait for it in backward where they want more.
    tracked: Tracked,
}

impl ExpertLoads {
    /// Starts to tell the other groups, if there are others. Collective over `replicas`, which carry nothing else in forward.
    ///
    /// # Errors
    ///
    /// The communicator's.
    pub fn start(
        replicas: Option<&Arc<dyn Communicator>>,
        operation: Operation,
        tracked: Tracked,
        counts: &RoutingCounts,
    ) -> Result<Self, FsepError> {
        let ours = counts.expert_totals();
        let Some(replicas) = replicas else { return Ok(Self { ours, pending: None }) };
        let mut message = ours.clone();
        message.push(tracked.bits().into());
        let (rank, groups, len) = (replicas.rank(), replicas.size(), size_of_val(message.as_slice()));
        let others = || (0..groups).filter(|&peer| peer != rank);
        let plan = ExchangePlan {
            sends: others().map(|peer| Block { peer, offset: 0, len }).collect(),
            recvs: others().map(|peer| Block { peer, offset: peer * len, len }).collect(),
            send_len: len,
            recv_len: groups * len,
        };
        let exchange = replicas.start_all_to_all_v(operation, Arc::new(Bytes::from_elems(message)), plan)?;
        Ok(Self { ours, pending: Some(Pending { exchange, replicas: replicas.clone(), tracked }) })
    }

    /// Waits for the other groups' numbers. Shape `[E]`
    ///
    /// # Errors
    ///
    /// [`FsepError::Divergence`] if groups want different gradients of the layer, and the communicator's.
    pub fn wait(self, layer: usize) -> Result<Vec<u64>, FsepError> {
        let Self { mut ours, pending } = self;
        let Some(Pending { exchange, replicas, tracked }) = pending else { return Ok(ours) };
        let mut differs = None;
        exchange.wait_for_blocks(&mut |block, bytes| {
            let theirs = bytemuck::pod_collect_to_vec::<u8, u64>(bytes);
            let (wanted, loads) = theirs.split_last().unwrap_or((&0, &[]));
            if *wanted != u64::from(tracked.bits()) {
                differs = differs.or(Some((block.peer, *wanted as u32)));
            }
            ours.iter_mut().zip(loads).for_each(|(sum, load)| *sum += load);
        })?;
        match differs {
            None => Ok(ours),
            Some((peer, wanted)) => Err(FsepError::Divergence {
                what: "the wanted gradients",
                layer,
                rank: replicas.world_rank(replicas.rank()),
                ours: Tracked::describe(tracked.bits()),
                peer: replicas.world_rank(peer),
                theirs: Tracked::describe(wanted),
            }),
        }
    }
}
