use super::{
    DispatchPlan, Dispatcher, Share,
    flow::{Flow, on_node},
};
use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// The smallest possible maximum load over any layout, and then few tokens that leave their node or rank.
///
/// Exact: no dispatch over the layout has a smaller maximum, unless the maximum is within the tolerance of the mean load
/// anyway. The tolerance leaves tokens on their node that would cross it for a gain that nobody could measure.
///
/// How much of an expert each of its holders computes is a flow, found as `docs/planner.md` describes. Within the flow,
/// assignments stay on their own rank first, then on their own node: given the flow, no choice has fewer off-rank or
/// cross-node tokens. The flow itself starts node-local and is repaired within nodes before tokens cross them; it is not
/// searched for the fewest.
#[derive(Debug, Clone)]
pub struct MinMax {
    tolerance: f64,
    flow: Flow,
    /// Shares in the order in which they are found, each with the place of the pair's share before it.
    shares: Vec<(Share, u32)>,
    /// Place of each pair's last share. Shape `[N * E]`.
    last: Vec<u32>,
    /// Assignments not given away yet. Shape `[N, E]`.
    rest: Vec<u32>,
    pair: Vec<Share>,
}

/// No share.
const NONE: u32 = u32::MAX;

impl Default for MinMax {
    fn default() -> Self {
        Self::new()
    }
}

impl MinMax {
    /// A dispatcher that accepts loads up to 0.4 % above the mean.
    pub fn new() -> Self {
        Self { tolerance: 0.004, ..Self::exact() }
    }

    /// A dispatcher without tolerance.
    pub fn exact() -> Self {
        Self {
            tolerance: 0.0,
            flow: Flow::default(),
            shares: Vec::new(),
            last: Vec::new(),
            rest: Vec::new(),
            pair: Vec::new(),
        }
    }

    /// Decides which source's assignments each edge carries: own rank first, then own node, then any.
    fn decompose(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts, plan: &mut DispatchPlan) {
        let (ranks, experts) = (layout.num_ranks(), layout.num_experts());
        self.shares.clear();
        self.rest.clear();
        self.rest.extend_from_slice(counts.as_slice());
        self.last.clear();
        self.last.resize(ranks * experts, NONE);
        for expert in 0..experts {
            let first = self.flow.starts[expert] as usize;
            let holders = layout.ranks_of(expert);
            let mut take = |rest: &mut u32, flow: &mut u32, source: usize, holder: u32| {
                let tokens = (*rest).min(*flow);
                if tokens > 0 {
                    *rest -= tokens;
                    *flow -= tokens;
                    let last = &mut self.last[source * experts + expert];
                    self.shares.push((Share { rank: holder, tokens }, *last));
                    *last = self.shares.len() as u32 - 1;
                }
            };
            for (i, &holder) in holders.iter().enumerate() {
                let source = holder as usize;
                take(&mut self.rest[source * experts + expert], &mut self.flow.edges[first + i], source, holder);
            }
            for node in 0..topology.num_nodes() {
                let members = topology.ranks_of(node);
                let std::ops::Range { start: mut i, end: last } = on_node(holders, &members);
                let mut source = members.start;
                while i < last && source < members.end {
                    let rest = &mut self.rest[source * experts + expert];
                    take(rest, &mut self.flow.edges[first + i], source, holders[i]);
                    if *rest == 0 { source += 1 } else { i += 1 }
                }
            }
            let (mut i, mut source) = (0, 0);
            while i < holders.len() && source < ranks {
                let rest = &mut self.rest[source * experts + expert];
                take(rest, &mut self.flow.edges[first + i], source, holders[i]);
                if *rest == 0 { source += 1 } else { i += 1 }
            }
        }
        plan.clear(ranks, experts);
        for &last in &self.last {
            self.pair.clear();
            let mut at = last;
            while at != NONE {
                let (share, before) = self.shares[at as usize];
                self.pair.push(share);
                at = before;
            }
            self.pair.sort_unstable_by_key(|share| share.rank);
            for share in &self.pair {
                plan.push(share.rank as usize, share.tokens);
            }
            plan.end_pair();
        }
    }
}

impl Dispatcher for MinMax {
    fn name(&self) -> &'static str {
        "min-max"
    }

    fn dispatch(
        &mut self,
        topology: &Topology,
        layout: &Layout,
        counts: &RoutingCounts,
        plan: &mut DispatchPlan,
    ) -> Result<(), PlannerError> {
        layout.check_fits(topology, counts)?;
        self.flow.solve(topology, layout, counts, self.tolerance);
        self.decompose(topology, layout, counts, plan);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_cases::{Case, cases};

    /// The bound of design section 6: no rank can be below `load(U) / |ranks holding any of U|` for any set of
    /// experts `U`. Its maximum over all sets is the optimum, by max-flow min-cut.
    fn bound_over_all_subsets(case: &Case) -> u64 {
        let experts = case.layout.num_experts();
        let totals = case.counts.expert_totals();
        (1u32..1 << experts)
            .map(|set| {
                let members = (0..experts).filter(|e| set >> e & 1 == 1);
                let load: u64 = members.clone().map(|e| totals[e]).sum();
                let mut holders: Vec<u32> = members.flat_map(|e| case.layout.ranks_of(e).to_vec()).collect();
                holders.sort_unstable();
                holders.dedup();
                load.div_ceil(holders.len() as u64)
            })
            .max()
            .unwrap_or(0)
    }

    fn solve(case: &Case) -> DispatchPlan {
        let mut plan = DispatchPlan::new();
        MinMax::exact().dispatch(&case.topology, &case.layout, &case.counts, &mut plan).unwrap();
        plan
    }

    proptest! {
        #[test]
        fn plans_are_valid_optimal_and_deterministic(case in cases(8, 8)) {
            let plan = solve(&case);
            plan.check(&case.layout, &case.counts).unwrap();
            let max = plan.loads().into_iter().max().unwrap();
            prop_assert_eq!(max, bound_over_all_subsets(&case));
            prop_assert_eq!(plan, solve(&case));
        }

        #[test]
        fn buffers_leave_no_trace(a in cases(6, 6), b in cases(6, 6)) {
            let mut dispatcher = MinMax::exact();
            let mut plan = DispatchPlan::new();
            dispatcher.dispatch(&a.topology, &a.layout, &a.counts, &mut plan).unwrap();
            dispatcher.dispatch(&b.topology, &b.layout, &b.counts, &mut plan).unwrap();
            prop_assert_eq!(plan, solve(&b));
        }
    }

    #[test]
    fn a_chain_of_shared_experts_levels_all_ranks() {
        // Expert 0 overloads rank 0; the load can leave only through expert 1 to rank 1 and expert 2 to rank 2.
        let case = Case {
            topology: Topology::single_node(3).unwrap(),
            layout: Layout::from_rows(3, &[vec![0, 1], vec![1, 2], vec![2, 0]]).unwrap(),
            counts: RoutingCounts::from_rows(&[vec![9, 0, 0], vec![0; 3], vec![0; 3]]).unwrap(),
        };
        assert_eq!(solve(&case).loads(), [5, 0, 4]);
    }
}
