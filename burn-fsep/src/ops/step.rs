use std::{
    ops::Range,
    sync::{Arc, Weak},
};

use burn::tensor::{DType, FloatDType};
use burn_fsep_planner::{Layout, dispatch::DispatchPlan};
use serde::{Deserialize, Serialize};

use crate::{
    FsepRuntime,
    comm::{Block, ExchangePlan, Operation},
    runtime::Outputs,
    schedule::Restore,
    shard::{ExpertShape, UnshardPlan},
    timeline::TimelineSpan,
};

/// How a rank keeps its experts' parameters between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WeightStorage {
    /// One shard of every expert, `[E, S]`: fully sharded expert parallel.
    Sharded,
    /// Whole experts of fixed owners, `[E / N, P]`: static expert parallelism, and FSEP on one rank.
    Resident,
}

/// Which inputs of a layer gradients are wanted for. Equal on all ranks, since collectives depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tracked {
    /// The layer's input.
    pub hidden: bool,
    /// The router's probabilities.
    pub probs: bool,
    /// The experts' parameters.
    pub weights: bool,
}

impl Tracked {
    /// Whether any gradient is wanted: whether this is a training step.
    pub fn any(&self) -> bool {
        self.hidden || self.probs || self.weights
    }

    /// Whether backward computes with the experts.
    pub(crate) fn needs_experts_in_backward(&self) -> bool {
        self.hidden || self.weights
    }

    pub(crate) fn bits(&self) -> u32 {
        u32::from(self.hidden) | u32::from(self.probs) << 1 | u32::from(self.weights) << 2
    }

    /// What a rank's [`Tracked::bits`] mean, for messages.
    pub(crate) fn describe(bits: u32) -> String {
        let names = [(1, "the input"), (2, "the router"), (4, "the experts")];
        let wanted: Vec<_> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
        if wanted.is_empty() {
            "no gradients wanted".into()
        } else {
            format!("gradients wanted of {}", wanted.join(", "))
        }
    }
}

/// Everything that one rank has to know to run one layer in one step.
#[derive(Debug)]
pub struct MoeStep {
    pub(crate) runtime: FsepRuntime,
    /// Where this pass's output waits to be connected to the loss.
    pub(crate) outputs: Weak<Outputs>,
    pub(crate) layer: usize,
    /// Which training pass of the layer this is: equal on all ranks.
    pub(crate) pass: u64,
    pub(crate) shape: ExpertShape,
    pub(crate) storage: WeightStorage,
    pub(crate) layout: Arc<Layout>,
    pub(crate) unshard: Arc<UnshardPlan>,
    /// Restores of this layer and of the one after; `None` where experts are resident.
    pub(crate) restores: Option<Restores>,
    /// Which gradients are wanted.
    pub(crate) tracked: Tracked,
    /// Type of the parameters and their gradients.
    pub(crate) param_dtype: DType,
    /// Type that the experts compute in; that of the parameters if `None`.
    pub(crate) compute_dtype: Option<FloatDType>,
    /// Assignments sorted by expert -> tokens sorted by slot; in rows.
    pub(crate) tokens: ExchangePlan,
    /// Rows of each slot after the All-to-All. Shape `[C]`.
    pub(crate) slot_rows: Vec<Range<usize>>,
    /// Experts per token `K`.
    pub(crate) topk: usize,
    /// Recompute activations in backward instead of keeping them.
    pub(crate) recompute: bool,
}

/// Restores that belong to one pass of a layer with sharded experts.
#[derive(Debug)]
pub(crate) struct Restores {
    /// For this forward pass; maybe started ahead, then maybe under a layout that was repaired since.
    pub forward: Arc<Restore>,
    /// For the backward pass.
    pub backward: Arc<Restore>,
    /// Of the layer after, to be started when this layer's tokens have come.
    pub next: Option<Arc<Restore>>,
    /// Backward comes next: the experts of the forward pass are kept for it.
    pub keep: bool,
}

impl MoeStep {
    /// The runtime of the rank.
    pub fn runtime(&self) -> &FsepRuntime {
        &self.runtime
    }

    /// A collective of this pass.
    pub(crate) fn operation(&self, name: &'static str) -> Operation {
        Operation::of_layer(name, self.layer).in_pass(self.pass)
    }

    /// Tells the runtime that this pass's backward has run.
    pub(crate) fn finished(&self) {
        if let Some(outputs) = self.outputs.upgrade() {
            outputs.forget(self.layer, self.pass);
        }
    }

    /// The restore for backward, if backward will need one.
    pub(crate) fn backward_restore(&self) -> Option<&Arc<Restore>> {
        self.restores.as_ref().filter(|_| self.tracked.needs_experts_in_backward()).map(|restores| &restores.backward)
    }

    /// Marks compute of this layer in the timeline, until it is dropped.
    pub(crate) fn span(&self, name: &'static str) -> Option<TimelineSpan> {
        self.runtime.timeline().and_then(|timeline| timeline.compute(format!("{name}, layer {}", self.layer)))
    }

    /// World size `N`.
    pub(crate) fn world_size(&self) -> usize {
        self.layout.num_ranks()
    }

    /// The experts of this rank by slot. Shape `[C]`.
    pub(crate) fn experts(&self) -> &[u32] {
        self.layout.experts_of(self.runtime.rank())
    }

    /// In which row of the resident parameters an expert lies.
    pub(crate) fn resident_row(&self, expert: usize) -> usize {
        let owned = self.layout.num_experts() / self.world_size();
        expert - self.runtime.rank() * owned
    }
}

/// The token All-to-All of `rank` under a dispatch plan, in rows, and the rows of each slot.
///
/// Assignments lie sorted by expert, so what goes to one replica is one block. On arrival the blocks are laid out by
/// slot, and within a slot by source rank: no permutation follows.
pub(crate) fn token_exchange(plan: &DispatchPlan, layout: &Layout, rank: usize) -> (ExchangePlan, Vec<Range<usize>>) {
    let mut sends = Vec::new();
    let mut offset = 0;
    for expert in 0..plan.num_experts() {
        for share in plan.shares(rank, expert) {
            sends.push(Block { peer: share.rank as usize, offset, len: share.tokens as usize });
            offset += share.tokens as usize;
        }
    }
    let send_len = offset;

    let mut recvs = Vec::new();
    let mut slot_rows = Vec::with_capacity(layout.slots_per_rank());
    let mut offset = 0;
    for &expert in layout.experts_of(rank) {
        let start = offset;
        for source in 0..plan.num_ranks() {
            let shares = plan.shares(source, expert as usize);
            if let Ok(i) = shares.binary_search_by_key(&(rank as u32), |share| share.rank) {
                let len = shares[i].tokens as usize;
                recvs.push((expert, Block { peer: source, offset, len }));
                offset += len;
            }
        }
        slot_rows.push(start..offset);
    }
    // Blocks of one pair of ranks are matched in order, and senders go by expert.
    recvs.sort_by_key(|(expert, _)| *expert);
    let recvs = recvs.into_iter().map(|(_, block)| block).collect();
    (ExchangePlan { sends, recvs, recv_len: offset, send_len }, slot_rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_fsep_planner::{
        RoutingCounts, Topology,
        dispatch::{Dispatcher, EvenSplit},
    };

    #[test]
    fn rows_arrive_grouped_by_slot() {
        let layout = Layout::from_rows(3, &[vec![2, 0], vec![1, 2]]).unwrap();
        let counts = RoutingCounts::from_rows(&[vec![1, 2, 4], vec![3, 0, 2]]).unwrap();
        let mut plan = DispatchPlan::new();
        let topology = Topology::single_node(2).unwrap();
        EvenSplit::new().dispatch(&topology, &layout, &counts, &mut plan).unwrap();
        let (exchange, slot_rows) = token_exchange(&plan, &layout, 0);
        exchange.check(Operation::new("tokens"), 2).unwrap();
        assert_eq!(exchange.send_len, 7);
        assert_eq!(slot_rows, [0..3, 3..7], "expert 2: 2 + 1 tokens, expert 0: 1 + 3 tokens");
        // Expert 0 comes before expert 2 in the order of the blocks, behind it in the buffer.
        assert_eq!(exchange.recvs[0], Block { peer: 0, offset: 3, len: 1 });
    }
}
