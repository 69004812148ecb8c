use super::{DispatchPlan, Dispatcher, flow::Flow};
use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// The smallest maximum load that the layout allows, or one within a tolerance of the mean load, and then the fewest tokens
/// that leave their node or rank.
///
/// - The maximum is at most `(1 + tolerance) * mean` (or the mean, rounded up) where the layout allows that; elsewhere it is
///   the smallest that any dispatch over the layout has. So it exceeds the optimum by at most `tolerance * mean`, and with
///   [`MinMax::exact`] by nothing.
/// - Of all dispatches with a maximum of at most that, none has fewer tokens that cross nodes, and of those with as few none
///   has fewer that leave their rank. This is what the tolerance is for: it leaves tokens where they are that would travel for
///   a gain that nobody could measure.
///
/// How much of an expert each of its holders computes is a flow, found as `docs/planner.md` describes. Within the flow,
/// assignments stay on their own rank first, then on their own node: given the flow, no choice has fewer off-rank or
/// cross-node tokens.
#[derive(Debug, Clone, Default)]
pub struct MinMax {
    tolerance: f64,
    flow: Flow,
    /// Parts of each edge's flow: for its holder's own tokens, for others of the holder's node, for other nodes.
    /// Shape `[N * C]` each.
    own: Vec<u32>,
    near: Vec<u32>,
    far: Vec<u32>,
    cursors: Vec<Cursor>,
    /// Own part of each expert on the source at hand. Shape `[E]`.
    own_of: Vec<u32>,
}

/// Where an expert's next tokens go, for sources of the node at hand.
#[derive(Debug, Clone, Copy, Default)]
struct Cursor {
    /// Edge in use, and end, of the edges on this node.
    near: u32,
    near_end: u32,
    /// Edge in use of those whose far part has something left.
    far: u32,
}

impl MinMax {
    /// A dispatcher with a tolerance of 0.4 % of the mean load.
    pub fn new() -> Self {
        Self { tolerance: 0.004, ..Self::default() }
    }

    /// A dispatcher without tolerance.
    pub fn exact() -> Self {
        Self::default()
    }

    /// Decides which source's assignments each edge carries: own rank first, then own node, then any.
    ///
    /// How much of an edge goes to which of the three follows from sums alone. So one pass over the counts in their own
    /// order is enough: each expert's sources, ascending, use up its edges, ascending.
    fn assign(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts, plan: &mut DispatchPlan) {
        self.split();
        let holders = layout.holders();
        self.cursors.clear();
        let first_edge = |&group: &u32| self.flow.groups[group as usize].first;
        self.cursors.extend(
            self.flow.group_starts[..layout.num_experts()].iter().map(first_edge).map(|first| Cursor {
                near: first,
                near_end: first,
                far: first,
            }),
        );
        self.own_of.clear();
        self.own_of.resize(layout.num_experts(), 0);
        plan.clear(layout.num_ranks(), layout.num_experts());
        for node in 0..topology.num_nodes() {
            for (expert, cursor) in self.cursors.iter_mut().enumerate() {
                cursor.near = cursor.near_end;
                if let Some(&group) = self.flow.group_of.get(cursor.near as usize)
                    && self.flow.groups[group as usize].expert as usize == expert
                    && self.flow.groups[group as usize].node as usize == node
                {
                    cursor.near_end = self.flow.groups[group as usize].end;
                }
            }
            for source in topology.ranks_of(node) {
                let held = layout.experts_of(source);
                for (slot, &expert) in held.iter().enumerate() {
                    self.own_of[expert as usize] = self.own[self.flow.edge_of(layout, source, slot)];
                }
                for ((&count, cursor), &own) in counts.row(source).iter().zip(&mut self.cursors).zip(&self.own_of) {
                    plan.push(source, own);
                    let mut rest = count - own;
                    while rest > 0 && cursor.near < cursor.near_end {
                        take(&mut rest, &mut self.near, &mut cursor.near, holders, plan);
                    }
                    while rest > 0 {
                        take(&mut rest, &mut self.far, &mut cursor.far, holders, plan);
                    }
                    plan.end_pair();
                }
                held.iter().for_each(|&expert| self.own_of[expert as usize] = 0);
            }
        }
    }

    /// Splits each edge's flow into its own, near and far part.
    fn split(&mut self) {
        self.own.clear();
        self.near.clear();
        self.far.clear();
        for group in &self.flow.groups {
            let mut others = group.supply;
            for edge in group.edges() {
                let own = self.flow.own[edge].min(self.flow.edges[edge]);
                self.own.push(own);
                others -= own;
            }
            for edge in group.edges() {
                let rest = self.flow.edges[edge] - self.own[edge];
                let near = rest.min(others);
                others -= near;
                self.near.push(near);
                self.far.push(rest - near);
            }
        }
    }
}

/// Gives as much of `rest` to the edge in use as it takes; goes on to the next edge when this one is used up.
fn take(rest: &mut u32, parts: &mut [u32], edge: &mut u32, holders: &[u32], plan: &mut DispatchPlan) {
    let part = &mut parts[*edge as usize];
    let tokens = (*rest).min(*part);
    plan.push(holders[*edge as usize] as usize, tokens);
    *rest -= tokens;
    *part -= tokens;
    *edge += u32::from(*part == 0);
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
        self.assign(topology, layout, counts, plan);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_cases::{Case, cases};

    /// The bound of `docs/planner.md` ("Dispatch"): no rank can be below `load(U) / |ranks holding any of U|` for any set of
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
