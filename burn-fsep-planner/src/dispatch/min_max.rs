use std::collections::VecDeque;

use super::{DispatchPlan, Dispatcher};
use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// The smallest possible maximum load over any layout, exactly, and then few tokens that leave their node or rank.
///
/// How much of an expert each of its holders computes is a flow from experts to ranks. The flow starts with every
/// token on its own node where that holds the expert, and is then repaired: as long as a rank exceeds the target, load
/// is pushed along a shortest chain of shared experts to a rank below the target. If no such rank can be reached, the
/// ranks reached compute only experts that stand on no other rank, so their mean load is a lower bound of the maximum,
/// and becomes the target. The target is a lower bound all the time, so the maximum at the end is the smallest.
///
/// Within the flow, assignments stay on their own rank first, then on their own node: given the flow, no choice has
/// fewer off-rank or cross-node tokens. The flow itself is not searched for the fewest.
#[derive(Debug, Clone, Default)]
pub struct MinMax {
    /// Flow on each edge (expert, holder), in the layout's order of holders. Shape `[N * C]`.
    flow: Vec<u32>,
    loads: Vec<u64>,
    edges: Edges,
    search: Search,
    shares: Vec<(u64, u32)>,
    rest: Vec<u32>,
    node_supply: Vec<u32>,
}

/// The edges of each expert and of each rank.
#[derive(Debug, Clone, Default)]
struct Edges {
    /// First edge of each expert. Shape `[E + 1]`.
    starts: Vec<u32>,
    /// Edges of each rank by slot. Shape `[N, C]`.
    of_rank: Vec<u32>,
}

impl Edges {
    fn fill(&mut self, layout: &Layout) {
        let slots = layout.slots_per_rank();
        self.starts.clear();
        self.starts.push(0);
        self.of_rank.clear();
        self.of_rank.resize(layout.num_ranks() * slots, 0);
        let mut edge = 0;
        for expert in 0..layout.num_experts() {
            for &rank in layout.ranks_of(expert) {
                let row = layout.experts_of(rank as usize);
                let slot = row.iter().position(|&e| e as usize == expert).unwrap_or_default();
                self.of_rank[rank as usize * slots + slot] = edge;
                edge += 1;
            }
            self.starts.push(edge);
        }
    }
}

/// Breadth-first search from overloaded ranks.
#[derive(Debug, Clone, Default)]
struct Search {
    /// Edge on which the rank before was left, and the one on which this rank was reached.
    reached_by: Vec<Option<(u32, u32)>>,
    previous: Vec<u32>,
    visited: Vec<bool>,
    seen_expert: Vec<bool>,
    queue: VecDeque<u32>,
}

impl MinMax {
    /// A dispatcher with empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every token on its own node where that holds the expert, spread so that loads are level.
    fn start(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts) {
        let experts = layout.num_experts();
        self.flow.clear();
        self.flow.resize(layout.as_slice().len(), 0);
        self.loads.clear();
        self.loads.resize(layout.num_ranks(), 0);
        for node in 0..topology.num_nodes() {
            let ranks = topology.ranks_of(node);
            self.node_supply.clear();
            self.node_supply.resize(experts, 0);
            for source in ranks.clone() {
                for (supply, &n) in self.node_supply.iter_mut().zip(counts.row(source)) {
                    *supply += n;
                }
            }
            for expert in 0..experts {
                let holders = layout.ranks_of(expert);
                let first = holders.partition_point(|&r| (r as usize) < ranks.start);
                let last = holders.partition_point(|&r| (r as usize) < ranks.end);
                let (first, last) = if first < last { (first, last) } else { (0, holders.len()) };
                let edge = self.edges.starts[expert] as usize;
                self.fill(self.node_supply[expert], &holders[first..last], edge + first);
            }
        }
    }

    /// Spreads `supply` over `holders`, whose edges start at `edge`, least loaded first.
    fn fill(&mut self, supply: u32, holders: &[u32], edge: usize) {
        let mut rest = u64::from(supply);
        while rest > 0 {
            // Raise the lowest holders to the level of the next, or as far as the rest reaches.
            let level = |r: &u32| self.loads[*r as usize];
            let lowest = holders.iter().map(level).min().unwrap_or_default();
            let next = holders.iter().map(level).filter(|&l| l > lowest).min();
            let count = holders.iter().filter(|r| level(r) == lowest).count() as u64;
            let step = next.map_or(u64::MAX, |next| next - lowest).min(rest / count);
            let mut left_over = if step == 0 { rest } else { 0 };
            for (i, &holder) in holders.iter().enumerate() {
                let load = &mut self.loads[holder as usize];
                if *load == lowest {
                    let add = if step > 0 { step } else { left_over.min(1) };
                    left_over -= left_over.min(add);
                    *load += add;
                    self.flow[edge + i] += add as u32;
                    rest -= add;
                }
            }
        }
    }

    /// Pushes load away from ranks above the target until none is; raises the target where it must.
    fn balance(&mut self, layout: &Layout) {
        let total: u64 = self.loads.iter().sum();
        let mut target = total.div_ceil(self.loads.len() as u64);
        while self.loads.iter().any(|&load| load > target) {
            match self.find_spare(layout, target) {
                Some(rank) => self.push(rank, target),
                None => {
                    let (mut sum, mut count) = (0, 0);
                    for (&load, _) in self.loads.iter().zip(&self.search.visited).filter(|(_, visited)| **visited) {
                        sum += load;
                        count += 1;
                    }
                    target = sum.div_ceil(count);
                }
            }
        }
    }

    /// The nearest rank below the target that some rank above it can pass load to.
    fn find_spare(&mut self, layout: &Layout, target: u64) -> Option<usize> {
        let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
        let search = &mut self.search;
        search.reached_by.clear();
        search.reached_by.resize(ranks, None);
        search.previous.clear();
        search.previous.resize(ranks, 0);
        search.visited.clear();
        search.visited.resize(ranks, false);
        search.seen_expert.clear();
        search.seen_expert.resize(layout.num_experts(), false);
        search.queue.clear();
        for (rank, _) in self.loads.iter().enumerate().filter(|(_, load)| **load > target) {
            search.visited[rank] = true;
            search.queue.push_back(rank as u32);
        }
        while let Some(rank) = search.queue.pop_front() {
            let row = layout.experts_of(rank as usize);
            for (slot, &expert) in row.iter().enumerate() {
                let edge = self.edges.of_rank[rank as usize * slots + slot];
                if search.seen_expert[expert as usize] || self.flow[edge as usize] == 0 {
                    continue;
                }
                search.seen_expert[expert as usize] = true;
                let first = self.edges.starts[expert as usize];
                for (i, &holder) in layout.ranks_of(expert as usize).iter().enumerate() {
                    let holder = holder as usize;
                    if search.visited[holder] {
                        continue;
                    }
                    search.visited[holder] = true;
                    search.reached_by[holder] = Some((edge, first + i as u32));
                    search.previous[holder] = rank;
                    if self.loads[holder] < target {
                        return Some(holder);
                    }
                    search.queue.push_back(holder as u32);
                }
            }
        }
        None
    }

    /// Pushes as much as fits along the chain that ends at `spare`.
    fn push(&mut self, spare: usize, target: u64) {
        let mut amount = target - self.loads[spare];
        let mut rank = spare;
        while let Some((from, _)) = self.search.reached_by[rank] {
            amount = amount.min(u64::from(self.flow[from as usize]));
            rank = self.search.previous[rank] as usize;
        }
        amount = amount.min(self.loads[rank] - target);
        self.loads[rank] -= amount;
        self.loads[spare] += amount;
        let mut rank = spare;
        while let Some((from, to)) = self.search.reached_by[rank] {
            self.flow[from as usize] -= amount as u32;
            self.flow[to as usize] += amount as u32;
            rank = self.search.previous[rank] as usize;
        }
    }

    /// Decides which source's assignments each edge carries: own rank first, then own node, then any.
    fn decompose(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts, plan: &mut DispatchPlan) {
        let (ranks, experts) = (layout.num_ranks(), layout.num_experts());
        self.shares.clear();
        self.rest.clear();
        self.rest.extend_from_slice(counts.as_slice());
        let key =
            |source: usize, expert: usize, rank: u32| ((source * experts + expert) as u64) << 32 | u64::from(rank);
        for expert in 0..experts {
            let first = self.edges.starts[expert] as usize;
            let holders = layout.ranks_of(expert);
            let mut take = |rest: &mut u32, flow: &mut u32, source: usize, holder: u32| {
                let tokens = (*rest).min(*flow);
                if tokens > 0 {
                    *rest -= tokens;
                    *flow -= tokens;
                    self.shares.push((key(source, expert, holder), tokens));
                }
            };
            for (i, &holder) in holders.iter().enumerate() {
                let source = holder as usize;
                take(&mut self.rest[source * experts + expert], &mut self.flow[first + i], source, holder);
            }
            for node in 0..topology.num_nodes() {
                let members = topology.ranks_of(node);
                let mut i = holders.partition_point(|&r| (r as usize) < members.start);
                let last = holders.partition_point(|&r| (r as usize) < members.end);
                let mut source = members.start;
                while i < last && source < members.end {
                    let rest = &mut self.rest[source * experts + expert];
                    take(rest, &mut self.flow[first + i], source, holders[i]);
                    if *rest == 0 { source += 1 } else { i += 1 }
                }
            }
            let (mut i, mut source) = (0, 0);
            while i < holders.len() && source < ranks {
                let rest = &mut self.rest[source * experts + expert];
                take(rest, &mut self.flow[first + i], source, holders[i]);
                if *rest == 0 { source += 1 } else { i += 1 }
            }
        }
        self.shares.sort_unstable();
        plan.clear(ranks, experts);
        let mut shares = self.shares.iter().peekable();
        for pair in 0..(ranks * experts) as u64 {
            while let Some(&&(key, tokens)) = shares.peek().filter(|(key, _)| key >> 32 == pair) {
                plan.push((key & 0xffff_ffff) as usize, tokens);
                shares.next();
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
        self.edges.fill(layout);
        self.start(topology, layout, counts);
        self.balance(layout);
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
        MinMax::new().dispatch(&case.topology, &case.layout, &case.counts, &mut plan).unwrap();
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
            let mut dispatcher = MinMax::new();
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
