use std::{ops::Range, sync::Arc};

use burn_fsep_planner::{Layout, RoutingCounts, dispatch::DispatchPlan};

use super::RankRows;
use crate::{
    comm::{Block, ExchangePlan},
    shard::UnshardPlan,
};

/// Where the tokens of one pass go, under which layout.
#[derive(Debug)]
pub struct RoutedDispatch {
    /// Which training pass of the layer this is, from 1; equal on all ranks.
    pub pass: u64,
    /// All ranks' routing counts. `[N, E]`
    pub counts: Arc<RoutingCounts>,
    /// The layout, maybe repaired for these counts.
    pub layout: Arc<Layout>,
    /// How shards travel under it.
    pub unshard: Arc<UnshardPlan>,
    /// Where the tokens of each chunk go; as many chunks on all ranks, at least one.
    pub chunks: Vec<ChunkDispatch>,
}

/// Where the tokens of a chunk go: some of a rank's tokens, of which those of the next travel while the experts compute these.
#[derive(Debug)]
pub struct ChunkDispatch {
    /// Which of this rank's tokens.
    pub range: Range<usize>,
    /// Assignments sorted by expert -> tokens sorted by slot; in rows.
    pub tokens: ExchangePlan,
    /// Rows of each slot after the All-to-All. Shape `[C]`.
    pub slot_rows: Vec<Range<usize>>,
    /// Rows of this rank's tokens, if they travel once to a rank and not once to an expert.
    pub rank_rows: Option<RankRows>,
}

impl ChunkDispatch {
    /// Rows of all slots, `M`.
    pub fn num_slot_rows(&self) -> usize {
        self.slot_rows.iter().map(Range::len).sum()
    }
}

/// The tokens of each of `chunks` parts of `tokens`, in order, as equal as possible.
pub fn chunk_ranges(tokens: usize, chunks: usize) -> impl Iterator<Item = Range<usize>> {
    (0..chunks).map(move |chunk| tokens * chunk / chunks..tokens * (chunk + 1) / chunks)
}

/// The token All-to-All of `rank` under a dispatch plan, in rows, and the rows of each slot.
///
/// Assignments lie sorted by expert, so what goes to one replica is one block. On arrival the blocks are laid out by
/// slot, and within a slot by source rank: no permutation follows.
pub fn token_exchange(plan: &DispatchPlan, layout: &Layout, rank: usize) -> (ExchangePlan, Vec<Range<usize>>) {
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
    use crate::comm::Operation;
    use burn_fsep_planner::{
        Topology,
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
