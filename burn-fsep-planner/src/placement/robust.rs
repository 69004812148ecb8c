use super::{
    LayoutRequest, LayoutSolver,
    group::{EXCHANGES, GroupSolver},
};
use crate::{
    Layout, PlannerError, RoutingCounts, Topology,
    dispatch::{Flow, max_over_mean},
    state,
};

/// Layouts that exact dispatch can balance even though the prediction is somewhat wrong.
///
/// Where every node can hold all experts (`E <= G * C`), each node gets a layout of its own for its own counts, so that
/// tokens need not cross nodes. Where that is not possible, or nodes have too few spare slots to balance that way, all
/// ranks are one group. How a group is laid out: see `GroupSolver`.
#[derive(Debug, Clone)]
pub struct RobustSolver {
    groups: GroupSolver,
    flow: Flow,
}

/// Imbalance on the prediction up to which node-local layouts are taken without looking further.
const BALANCED: f64 = 1.01;

impl RobustSolver {
    /// A solver with a seed for its random placements and perturbations.
    pub fn new(seed: u64) -> Self {
        Self { groups: GroupSolver::new(seed), flow: Flow::default() }
    }

    /// Sets how many placements are tried for a group (12 by default).
    pub fn with_candidates(mut self, candidates: usize) -> Self {
        self.groups.candidates = candidates;
        self
    }
}

impl LayoutSolver for RobustSolver {
    fn name(&self) -> &'static str {
        "robust"
    }

    fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
        request.check()?;
        let LayoutRequest { topology, slots_per_rank: slots, predicted, .. } = *request;
        let experts = predicted.num_experts();
        let whole = std::iter::once(0..topology.world_size());
        let nodes = (0..topology.num_nodes()).map(|node| topology.ranks_of(node));
        if topology.num_nodes() == 1 || nodes.clone().any(|ranks| ranks.len() * slots < experts) {
            return self.solve_groups(whole, request, EXCHANGES);
        }
        let by_node = self.solve_groups(nodes.clone(), request, 0)?;
        let imbalance = self.imbalance(topology, &by_node, predicted);
        if imbalance <= BALANCED {
            return Ok(by_node);
        }
        let across = self.solve_groups(whole, request, EXCHANGES)?;
        // Crossing nodes has a price: it has to balance clearly better.
        if self.imbalance(topology, &across, predicted) * BALANCED < imbalance {
            return Ok(across);
        }
        self.solve_groups(nodes, request, EXCHANGES / topology.num_nodes())
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        state::put(state, &self.groups.rng)
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        self.groups.rng = state::take(state)?;
        Ok(())
    }
}

impl RobustSolver {
    fn solve_groups(
        &mut self,
        groups: impl Iterator<Item = std::ops::Range<usize>>,
        request: &LayoutRequest<'_>,
        exchanges: usize,
    ) -> Result<Layout, PlannerError> {
        let LayoutRequest { topology, slots_per_rank: slots, predicted, previous } = *request;
        let experts = predicted.num_experts();
        let mut table = Vec::with_capacity(topology.world_size() * slots);
        self.groups.exchanges = exchanges;
        for ranks in groups {
            let totals = predicted.totals_of(ranks.clone());
            let before = previous.map(|layout| &layout.as_slice()[ranks.start * slots..ranks.end * slots]);
            // The previous layout need not be node-local: then a group's part of it lacks experts and is not considered.
            let before = before.and_then(|part| Layout::new(ranks.len(), slots, experts, part.to_vec()).ok());
            table.extend_from_slice(self.groups.solve(ranks.len(), slots, &totals, before)?.as_slice());
        }
        Layout::new(topology.world_size(), slots, experts, table)
    }

    /// Imbalance of the layout's best dispatch.
    fn imbalance(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts) -> f64 {
        self.flow.solve_loads(topology, layout, counts, BALANCED - 1.0);
        max_over_mean(&self.flow.loads)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        dispatch::{DispatchPlan, Dispatcher, MinMax},
        test_cases::cases,
    };

    #[test]
    fn a_good_layout_is_kept() {
        let topology = Topology::single_node(4).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![40, 20, 30, 10]; 4]).unwrap();
        let mut solver = RobustSolver::new(1);
        let mut request = LayoutRequest { topology: &topology, slots_per_rank: 2, predicted: &counts, previous: None };
        let first = solver.solve(&request).unwrap();
        request.previous = Some(&first);
        assert_eq!(solver.solve(&request).unwrap().moved_slots(&first), 0);
    }

    #[test]
    fn tokens_stay_on_their_node_where_nodes_hold_all_experts() {
        let topology = Topology::new(&[4, 3]).unwrap();
        // Each node has hot experts of its own.
        let rows = [vec![vec![60, 20, 15, 5]; 4], vec![vec![5, 15, 20, 60]; 3]].concat();
        let counts = RoutingCounts::from_rows(&rows).unwrap();
        let request = LayoutRequest { topology: &topology, slots_per_rank: 3, predicted: &counts, previous: None };
        let layout = RobustSolver::new(1).solve(&request).unwrap();
        let mut plan = DispatchPlan::new();
        MinMax::new().dispatch(&topology, &layout, &counts, &mut plan).unwrap();
        assert!(plan.max_over_mean() < 1.02, "{}", plan.max_over_mean());
        assert!(plan.cross_node_tokens(&topology) * 50 < counts.total(), "{}", plan.cross_node_tokens(&topology));
    }

    #[test]
    fn nodes_without_spare_slots_do_not_keep_a_hot_expert_to_themselves() {
        let topology = Topology::uniform(4, 2).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![75, 15, 5, 5]; 4]).unwrap();
        let request = LayoutRequest { topology: &topology, slots_per_rank: 2, predicted: &counts, previous: None };
        let layout = RobustSolver::new(1).solve(&request).unwrap();
        let mut plan = DispatchPlan::new();
        MinMax::new().dispatch(&topology, &layout, &counts, &mut plan).unwrap();
        assert!(plan.max_over_mean() < 1.02, "{}", plan.max_over_mean());
    }

    proptest! {
        #[test]
        fn layouts_are_deterministic_and_fit(case in cases(9, 12)) {
            let request = LayoutRequest {
                topology: &case.topology,
                slots_per_rank: case.layout.slots_per_rank(),
                predicted: &case.counts,
                previous: Some(&case.layout),
            };
            let layout = RobustSolver::new(3).solve(&request).unwrap();
            prop_assert_eq!(&layout, &RobustSolver::new(3).solve(&request).unwrap());
            prop_assert_eq!(layout.as_slice().len(), case.layout.as_slice().len());
        }
    }
}
