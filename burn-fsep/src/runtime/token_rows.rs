use burn_fsep_planner::dispatch::{DispatchPlan, TokenRowBounds};
use serde::{Deserialize, Serialize};

use crate::ops::{LayerSpec, Tracked};

/// How tokens travel to the ranks that compute their experts, and results and gradients back. Results differ by no more than
/// the rounding of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum TokenRows {
    /// Pass by pass, by bytes: once to a rank where that saves more than planning it costs.
    #[default]
    Auto,
    /// Once for each of a token's experts.
    ByAssignment,
    /// Once to each rank that computes any of a token's experts; a rank weighs and sums what its experts make of a token. Passes in
    /// which a rank has 2^24 slot rows or more are by assignment.
    ByRank {
        /// Ranks tell each other how many rows there are, which the host waits for. Otherwise there is room for as many as the
        /// dispatch allows, which with few ranks and many experts a token is hardly more.
        counted: bool,
    },
}

/// What planning rows by rank costs, and what counting them costs besides, in bytes that a rank could send meanwhile.
struct PlanningCost {
    planning: f64,
    counting: f64,
}

/// Between GPUs. An estimate: some 0.2 ms of small kernels and 0.1 ms of waiting for a gather, at the 140 GB/s at which two
/// H200 exchanged tokens.
const BETWEEN_GPUS: PlanningCost = PlanningCost { planning: 28e6, counting: 14e6 };

/// Through host memory. An estimate: some 0.5 ms and 0.1 ms at 2 GB/s.
const THROUGH_HOST: PlanningCost = PlanningCost { planning: 1e6, counting: 2e5 };

/// Places travel as numbers of single precision, which has all integers up to here.
const MOST_PLACES: u64 = 1 << 24;

/// What a layer's pass is to send.
pub(super) struct TokenTraffic<'a> {
    pub spec: &'a LayerSpec,
    pub tracked: Tracked,
    /// Bytes of an element of a token.
    pub element: usize,
}

impl TokenTraffic<'_> {
    /// Bytes of so many tokens in all exchanges of a forward and backward pass, by assignment.
    pub fn bytes_by_assignment(&self, rows: f64) -> f64 {
        let Tracked { hidden, weights, .. } = self.tracked;
        let exchanges = 2 + usize::from(hidden || weights) + usize::from(hidden);
        rows * (exchanges * self.spec.shape.hidden * self.element) as f64
    }

    /// The same by rank: with a place and a weight for each of a row's `K` assignments, and a gradient of the weight.
    pub fn bytes_by_rank(&self, rows: f64) -> f64 {
        let Tracked { hidden, probs, .. } = self.tracked;
        let exchanges = 2 + usize::from(self.tracked.any()) + usize::from(hidden);
        let numbers = (2 + usize::from(probs)) * self.spec.topk * self.element.max(4);
        rows * (exchanges * self.spec.shape.hidden * self.element + numbers) as f64
    }
}

/// How the rows of a pass by rank are found.
pub(super) struct RowsByRank {
    /// No more than these from each rank to each. Shape `[N, N]`
    pub most: Vec<u64>,
    /// Whether they are counted.
    pub counted: bool,
}

impl TokenRows {
    /// Whether tokens travel once to a rank in a pass: equal on all ranks, since the plan is.
    pub(super) fn choose(self, plan: &DispatchPlan, traffic: &TokenTraffic<'_>, on_gpus: bool) -> Option<RowsByRank> {
        let LayerSpec { num_ranks, topk, .. } = *traffic.spec;
        if num_ranks == 1 || self == Self::ByAssignment || plan.loads().into_iter().any(|load| load >= MOST_PLACES) {
            return None;
        }
        let bounds = TokenRowBounds::new(plan, topk);
        let counted = match self {
            Self::ByRank { counted } => counted,
            _ => {
                let cost = if on_gpus { BETWEEN_GPUS } else { THROUGH_HOST };
                let a_rank = |bytes: f64| bytes / num_ranks as f64;
                let by_assignment = a_rank(traffic.bytes_by_assignment(bounds.off_rank_assignments() as f64));
                let bounded = a_rank(traffic.bytes_by_rank(bounds.off_rank_most() as f64));
                let counted = a_rank(traffic.bytes_by_rank(bounds.off_rank_expected())) + cost.counting;
                if by_assignment <= bounded.min(counted) + cost.planning {
                    return None;
                }
                counted < bounded
            }
        };
        Some(RowsByRank { most: bounds.most().to_vec(), counted })
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;
    use burn_fsep_planner::{
        Layout, RoutingCounts, Topology,
        dispatch::{Dispatcher, EvenSplit},
    };

    use super::*;
    use crate::{FSEPMoEConfig, FsepRuntime};

    /// The way chosen for 64 experts of `ranks` ranks, D = 2048, bf16, for an even choice of `topk`: whether rows are counted, if
    /// they are by rank.
    fn chosen(policy: TokenRows, ranks: usize, topk: usize, tokens: u32) -> Option<bool> {
        let layout = Layout::static_ep(ranks, 64 / ranks, 64).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![tokens * topk as u32 / 64; 64]; ranks]).unwrap();
        let mut plan = DispatchPlan::new();
        EvenSplit::new().dispatch(&Topology::single_node(ranks).unwrap(), &layout, &counts, &mut plan).unwrap();
        let runtime = FsepRuntime::single();
        let layer = FSEPMoEConfig::new(8, 8, 64).init_experts(&runtime, &Device::flex()).layer_index();
        let mut spec = LayerSpec { num_ranks: ranks, topk, ..runtime.layer_spec(layer).unwrap() };
        spec.shape.hidden = 2048;
        let tracked = Tracked { hidden: true, probs: true, weights: true };
        let traffic = TokenTraffic { spec: &spec, tracked, element: 2 };
        policy.choose(&plan, &traffic, true).map(|rows| rows.counted)
    }

    #[test]
    fn rows_are_by_rank_where_that_pays() {
        assert_eq!(chosen(TokenRows::Auto, 2, 8, 16384), Some(false), "hardly more than there are");
        assert_eq!(chosen(TokenRows::Auto, 8, 8, 16384), Some(true));
        assert_eq!(chosen(TokenRows::Auto, 2, 8, 256), None, "too few");
        assert_eq!(chosen(TokenRows::Auto, 2, 1, 16384), None, "nothing to share");
        assert_eq!(chosen(TokenRows::Auto, 1, 8, 16384), None);
    }

    #[test]
    fn what_is_asked_for_is_done() {
        assert_eq!(chosen(TokenRows::ByAssignment, 2, 8, 16384), None);
        for counted in [false, true] {
            assert_eq!(chosen(TokenRows::ByRank { counted }, 2, 1, 64), Some(counted));
            assert_eq!(chosen(TokenRows::ByRank { counted }, 1, 8, 64), None, "nothing travels");
        }
    }
}
