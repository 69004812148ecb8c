use std::{cmp::Reverse, collections::BinaryHeap};

use super::{builder::LayoutBuilder, replicas::PerReplica};
use crate::{
    Layout, PlannerError, SplitMix64, Topology,
    cost::{CommunicationModel, CostConstants, CostModel},
    dispatch::{DispatchPlan, Dispatcher, EvenSplit},
    placement::{LayoutRequest, LayoutSolver},
    state,
};

/// The layout solver of LAER-MoE (section 3.3): replica counts in proportion to load, greedy placement, and a few
/// candidates of which the cost model picks the best.
///
/// Candidates are the proportional replica counts, even ones, and random exchanges of a replica between two experts.
/// Which of them is best depends on how fast the cluster computes and communicates: [`PaperSolver::default`] has the
/// constants of the paper's 32 A100, [`PaperSolver::new`] takes yours. `PlannerConfig::with_solver` brings the solver into
/// training.
#[derive(Debug, Clone)]
pub struct PaperSolver {
    cost: CostModel,
    exchanges: usize,
    rng: SplitMix64,
    plan: DispatchPlan,
}

impl PaperSolver {
    /// The solver with a cost model and a seed for its random exchanges.
    ///
    /// The model's constants are measured; for CPUs `fsep-planner calibrate` does it (`MeasuredConstants::cost_constants`).
    pub fn new(cost: CostModel, seed: u64) -> Self {
        Self { cost, exchanges: 6, rng: SplitMix64::new(seed), plan: DispatchPlan::new() }
    }

    /// Sets how many random exchanges are tried (6 by default).
    pub fn with_exchanges(mut self, exchanges: usize) -> Self {
        self.exchanges = exchanges;
        self
    }
}

impl Default for PaperSolver {
    /// The solver with the paper's own cost model: [`CostConstants::paper_mixtral_8x7b`], [`CommunicationModel::RankSum`], no
    /// recomputation.
    fn default() -> Self {
        let constants = CostConstants::paper_mixtral_8x7b();
        Self::new(CostModel { constants, communication: CommunicationModel::RankSum, recompute: false }, 0)
    }
}

impl LayoutSolver for PaperSolver {
    fn name(&self) -> &'static str {
        "paper"
    }

    fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
        request.check()?;
        let topology = request.topology;
        let loads = request.predicted.expert_totals();
        let slots = topology.world_size() * request.slots_per_rank;
        let proportional = proportional_replicas(&loads, topology, slots);
        let mut candidates = vec![proportional.clone(), even_replicas(loads.len(), slots)];
        for _ in 0..self.exchanges {
            let (from, to) = (self.rng.below(loads.len()), self.rng.below(loads.len()));
            if from != to && proportional[from] > 1 && proportional[to] < topology.world_size() {
                let mut exchanged = proportional.clone();
                exchanged[from] -= 1;
                exchanged[to] += 1;
                candidates.push(exchanged);
            }
        }
        let mut best: Option<(f64, Layout)> = None;
        for replicas in candidates {
            let Some(layout) = place(&loads, &replicas, topology, request.slots_per_rank) else { continue };
            let layout = layout?;
            EvenSplit::new().dispatch(topology, &layout, request.predicted, &mut self.plan)?;
            let cost = self.cost.layer_seconds(topology, &self.plan);
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, layout));
            }
        }
        match best {
            Some((_, layout)) => Ok(layout),
            // Greedy placement can paint itself into a corner; the static layout always exists.
            None => Layout::static_ep(topology.world_size(), request.slots_per_rank, loads.len()),
        }
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        state::put(state, &self.rng)
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        self.rng = state::take(state)?;
        Ok(())
    }
}

/// Replicas of each expert in proportion to its load, `R_e <= N`. `[E] -> [E]`
///
/// Every expert starts with one replica a node if that fits, else with one. Then the expert with the most load per
/// replica gets another (one a node at a time once it stands on all nodes), until the slots are used.
pub(super) fn proportional_replicas(loads: &[u64], topology: &Topology, slots: usize) -> Vec<usize> {
    let (ranks, nodes) = (topology.world_size(), topology.num_nodes());
    let first = if loads.len() * nodes <= slots { nodes } else { 1 };
    let mut replicas = vec![first; loads.len()];
    let mut left = slots - first * loads.len();
    // Ties go to the lower expert.
    let per_replica = |e: usize, count: usize| PerReplica { load: loads[e], replicas: count as u64 };
    let mut heap: BinaryHeap<(PerReplica, Reverse<usize>)> =
        (0..loads.len()).map(|e| (per_replica(e, first), Reverse(e))).collect();
    while left > 0 {
        let Some((_, Reverse(expert))) = heap.pop() else { break };
        let wanted = if replicas[expert] < nodes { 1 } else { nodes };
        let added = wanted.min(left).min(ranks - replicas[expert]);
        replicas[expert] += added;
        left -= added;
        if replicas[expert] < ranks {
            heap.push((per_replica(expert, replicas[expert]), Reverse(expert)));
        }
    }
    replicas
}

fn even_replicas(experts: usize, slots: usize) -> Vec<usize> {
    (0..experts).map(|e| slots / experts + usize::from(e < slots % experts)).collect()
}

/// Greedy placement: replicas in descending load, each to the least loaded rank with a free slot among the nodes that
/// hold the fewest replicas of its expert. `None` if it gets stuck.
pub(super) fn place(
    loads: &[u64],
    replicas: &[usize],
    topology: &Topology,
    slots_per_rank: usize,
) -> Option<Result<Layout, PlannerError>> {
    let ranks = topology.world_size();
    let mut order: Vec<usize> = (0..loads.len()).collect();
    let per_replica = |e: usize| PerReplica { load: loads[e], replicas: replicas[e].max(1) as u64 };
    order.sort_by_key(|&e| (Reverse(per_replica(e)), e));
    let mut builder = LayoutBuilder::new(ranks, slots_per_rank, loads.len());
    let mut rank_loads = vec![0.0f64; ranks];
    for expert in order {
        let share = loads[expert] as f64 / replicas[expert].max(1) as f64;
        let mut on_node = vec![0usize; topology.num_nodes()];
        for _ in 0..replicas[expert] {
            let free = (0..ranks).filter(|&rank| builder.can_take(rank, expert));
            let chosen = free.min_by(|&a, &b| {
                let nodes = [on_node[topology.node_of(a)], on_node[topology.node_of(b)]];
                nodes[0].cmp(&nodes[1]).then(rank_loads[a].total_cmp(&rank_loads[b])).then(a.cmp(&b))
            });
            match chosen {
                Some(rank) => {
                    builder.put(rank, expert);
                    rank_loads[rank] += share;
                    on_node[topology.node_of(rank)] += 1;
                }
                None if builder.put_by_exchange(expert) => {}
                None => return None,
            }
        }
    }
    Some(builder.finish())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{RoutingCounts, test_cases::cases};

    #[test]
    fn hot_experts_get_more_replicas() {
        let topology = Topology::uniform(8, 4).unwrap();
        assert_eq!(proportional_replicas(&[100, 10, 10, 10], &topology, 16), [8, 4, 2, 2]);
    }

    #[test]
    fn balances_a_hot_expert() {
        let topology = Topology::single_node(4).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![60, 10, 10, 10]; 4]).unwrap();
        let request = LayoutRequest { topology: &topology, slots_per_rank: 2, predicted: &counts, previous: None };
        let layout = PaperSolver::default().solve(&request).unwrap();
        assert!((0..4).all(|e| layout.replicas(e) <= layout.replicas(0)), "{layout:?}");
        assert!(layout.replicas(0) >= 3, "{layout:?}");
    }

    proptest! {
        #[test]
        fn layouts_are_deterministic_and_fit(case in cases(8, 12)) {
            let request = LayoutRequest {
                topology: &case.topology,
                slots_per_rank: case.layout.slots_per_rank(),
                predicted: &case.counts,
                previous: Some(&case.layout),
            };
            let layout = PaperSolver::default().solve(&request).unwrap();
            prop_assert_eq!(&layout, &PaperSolver::default().solve(&request).unwrap());
            prop_assert_eq!(layout.as_slice().len(), case.layout.as_slice().len());
        }
    }
}
