use std::sync::Arc;

use burn::tensor::Bytes;
use burn_fsep_planner::RoutingCounts;

use crate::comm::{Block, CommError, Communicator, ExchangePlan, Operation, PendingExchange};

/// The assignments of each expert in one pass, on all ranks: what the ranks that share the experts have of them is known with the
/// pass's counts, the other groups' numbers are under way while the experts compute.
pub(crate) struct ExpertLoads {
    /// Of this rank's group. Shape `[E]`
    ours: Vec<u64>,
    pending: Option<Box<dyn PendingExchange>>,
}

impl ExpertLoads {
    /// Starts to tell the other groups. Collective over `replicas`.
    pub fn start(replicas: &dyn Communicator, operation: Operation, counts: &RoutingCounts) -> Result<Self, CommError> {
        let ours = counts.expert_totals();
        if replicas.size() == 1 {
            return Ok(Self { ours, pending: None });
        }
        let (rank, groups, len) = (replicas.rank(), replicas.size(), size_of_val(ours.as_slice()));
        let others = || (0..groups).filter(|&peer| peer != rank);
        let plan = ExchangePlan {
            sends: others().map(|peer| Block { peer, offset: 0, len }).collect(),
            recvs: others().map(|peer| Block { peer, offset: peer * len, len }).collect(),
            send_len: len,
            recv_len: groups * len,
        };
        let send = Arc::new(Bytes::from_elems(ours.clone()));
        Ok(Self { ours, pending: Some(replicas.start_all_to_all_v(operation, send, plan)?) })
    }

    /// Waits for the other groups' numbers. Shape `[E]`
    pub fn wait(self) -> Result<Vec<u64>, CommError> {
        let Self { mut ours, pending } = self;
        if let Some(pending) = pending {
            pending.wait_for_blocks(&mut |_, bytes| {
                let theirs = bytemuck::pod_collect_to_vec::<u8, u64>(bytes);
                ours.iter_mut().zip(theirs).for_each(|(sum, load)| *sum += load);
            })?;
        }
        Ok(ours)
    }
}
