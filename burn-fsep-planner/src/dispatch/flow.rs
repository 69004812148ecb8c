use super::min_cost::{Prices, Search};
use crate::{Layout, RoutingCounts, Topology};

/// How much of each expert each of its holders computes, and the search for the flow with the smallest maximum load and,
/// among those, the fewest tokens that cross nodes, and then the fewest that leave their rank.
///
/// All buffers are reused from call to call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flow {
    /// Flow on each edge (expert, holder), in the layout's order of holders. Shape `[N * C]`.
    pub edges: Vec<u32>,
    /// Assignments of each edge's holder to its expert: flow up to this stays on its rank. Shape `[N * C]`.
    pub own: Vec<u32>,
    /// Load of each rank. Shape `[N]`.
    pub loads: Vec<u64>,
    /// Holders of one expert on one node, in the order of edges.
    pub groups: Vec<Group>,
    /// First group of each expert. Shape `[E + 1]`.
    pub group_starts: Vec<u32>,
    /// Group of each edge. Shape `[N * C]`.
    pub group_of: Vec<u32>,
    /// Edges of each rank by slot. Shape `[N, C]`.
    of_rank: Vec<u32>,
    /// Assignments of the node at hand to each expert. Shape `[E]`.
    supply: Vec<u32>,
    /// First group of each expert that is not on a node before the one at hand. Shape `[E]`.
    cursors: Vec<u32>,
    order: Vec<(u64, u32)>,
    search: Search,
}

/// The holders of one expert on one node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    /// The expert.
    pub expert: u32,
    /// The node.
    pub node: u32,
    /// First edge.
    pub first: u32,
    /// One past the last edge.
    pub end: u32,
    /// Assignments of the node's own tokens to the expert.
    pub supply: u32,
    /// Sum of the flow on its edges: what exceeds the supply comes from other nodes.
    pub flow: u32,
}

impl Group {
    /// The edges.
    pub fn edges(&self) -> std::ops::Range<usize> {
        self.first as usize..self.end as usize
    }
}

/// Passes in which each expert's flow is levelled by itself before chains are searched: more cost more than they save.
const SWEEPS: usize = 1;

impl Flow {
    /// The flow of `counts` over `layout` whose maximum load is the smallest possible, or at most
    /// `(1 + tolerance) * mean` if that is more; among these flows one with the fewest tokens that cross nodes, and among
    /// those one with the fewest that leave their rank.
    ///
    /// It starts with every token on its own rank where that holds the expert, else on its own node where that does: no
    /// flow has fewer tokens that leave either. As long as a rank exceeds the target, load is pushed along a cheapest
    /// chain of shared experts to a rank below it, which keeps these the fewest for the loads reached ([`Search`]). If no
    /// such rank can be reached, the ranks that were reached compute only experts that stand on no other rank; so their
    /// mean load bounds the maximum from below and becomes the target. The target never exceeds what it started with
    /// unless it is such a bound, hence the result.
    pub fn solve(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts, tolerance: f64) {
        self.prepare(topology, layout);
        self.start(topology, layout, counts);
        let target = self.target(tolerance);
        let reached = self.balance(layout, target, Prices::Lexicographic);
        if reached > target {
            // The chains were cheapest for a target that cannot be: once more, for the one that can.
            self.start(topology, layout, counts);
            self.balance(layout, reached, Prices::Lexicographic);
        }
    }

    /// As [`Flow::solve`] where only loads matter: enough to judge a layout. Where the target cannot be reached, the ranks
    /// that cannot pass load on any further are level.
    pub fn solve_loads(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts, tolerance: f64) {
        self.prepare(topology, layout);
        self.start(topology, layout, counts);
        self.balance(layout, self.target(tolerance), Prices::Free);
    }

    /// As [`Flow::solve_loads`] on one node, from the experts' totals alone. Returns the maximum load.
    pub fn solve_totals(&mut self, layout: &Layout, totals: &[u64], node: &Topology, tolerance: f64) -> u64 {
        self.prepare(node, layout);
        for (expert, &load) in totals.iter().enumerate() {
            self.groups[expert].supply = load as u32;
            self.fill(load as u32, expert..expert + 1, layout);
        }
        self.balance(layout, self.target(tolerance), Prices::Free);
        self.loads.iter().copied().max().unwrap_or(0)
    }

    /// The edge (expert, rank) of a slot.
    pub fn edge_of(&self, layout: &Layout, rank: usize, slot: usize) -> usize {
        self.of_rank[rank * layout.slots_per_rank() + slot] as usize
    }

    fn target(&self, tolerance: f64) -> u64 {
        let total: u64 = self.loads.iter().sum();
        let mean = total as f64 / self.loads.len() as f64;
        total.div_ceil(self.loads.len() as u64).max((mean * (1.0 + tolerance)) as u64)
    }

    /// Sets sizes and finds edges and groups.
    fn prepare(&mut self, topology: &Topology, layout: &Layout) {
        let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
        self.of_rank.clear();
        self.of_rank.resize(ranks * slots, 0);
        self.groups.clear();
        self.group_starts.clear();
        self.group_of.clear();
        let mut edge = 0;
        for expert in 0..layout.num_experts() {
            self.group_starts.push(self.groups.len() as u32);
            let mut on_node = u32::MAX;
            for &rank in layout.ranks_of(expert) {
                let slot = layout.slot_of(rank as usize, expert).unwrap_or_default();
                self.of_rank[rank as usize * slots + slot] = edge;
                let node = topology.node_of(rank as usize) as u32;
                if node != on_node {
                    on_node = node;
                    let expert = expert as u32;
                    self.groups.push(Group { expert, node, first: edge, end: edge, supply: 0, flow: 0 });
                }
                edge += 1;
                let group = self.groups.len() - 1;
                self.groups[group].end = edge;
                self.group_of.push(group as u32);
            }
        }
        self.group_starts.push(self.groups.len() as u32);
        self.forget_flow(layout);
    }

    fn forget_flow(&mut self, layout: &Layout) {
        self.edges.clear();
        self.edges.resize(self.group_of.len(), 0);
        self.own.clear();
        self.own.resize(self.group_of.len(), 0);
        self.loads.clear();
        self.loads.resize(layout.num_ranks(), 0);
        self.groups.iter_mut().for_each(|group| group.flow = 0);
    }

    /// Every token on its own rank where that holds the expert, else on its own node where that does, else anywhere.
    fn start(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts) {
        self.forget_flow(layout);
        for rank in 0..layout.num_ranks() {
            for (slot, &expert) in layout.experts_of(rank).iter().enumerate() {
                let own = counts.get(rank, expert as usize);
                let edge = self.edge_of(layout, rank, slot);
                self.own[edge] = own;
                self.edges[edge] = own;
                self.loads[rank] += u64::from(own);
                self.groups[self.group_of[edge] as usize].flow += own;
            }
        }
        let mut supply = std::mem::take(&mut self.supply);
        let mut cursors = std::mem::take(&mut self.cursors);
        cursors.clear();
        cursors.extend_from_slice(&self.group_starts[..layout.num_experts()]);
        for node in 0..topology.num_nodes() {
            supply.clear();
            supply.resize(layout.num_experts(), 0);
            for source in topology.ranks_of(node) {
                for (supply, &n) in supply.iter_mut().zip(counts.row(source)) {
                    *supply += n;
                }
            }
            for (expert, (&supply, cursor)) in supply.iter().zip(&mut cursors).enumerate() {
                let all = self.group_starts[expert] as usize..self.group_starts[expert + 1] as usize;
                let group = *cursor as usize;
                if group < all.end && self.groups[group].node as usize == node {
                    *cursor += 1;
                    self.groups[group].supply = supply;
                    let own: u32 = self.own[self.groups[group].edges()].iter().sum();
                    self.fill(supply - own, group..group + 1, layout);
                } else {
                    self.fill(supply, all, layout);
                }
            }
        }
        self.supply = supply;
        self.cursors = cursors;
    }

    /// Adds flow to groups of one expert: raises the least loaded holders to one level.
    fn fill(&mut self, amount: u32, groups: std::ops::Range<usize>, layout: &Layout) {
        if amount == 0 {
            return;
        }
        let (first, end) = (self.groups[groups.start].first as usize, self.groups[groups.end - 1].end as usize);
        let holders = &layout.holders()[first..end];
        if let [holder] = holders {
            self.edges[first] += amount;
            self.loads[*holder as usize] += u64::from(amount);
            self.groups[groups.start].flow += amount;
            return;
        }
        self.order.clear();
        self.order.extend(holders.iter().enumerate().map(|(i, &r)| (self.loads[r as usize], i as u32)));
        self.order.sort_unstable();
        // The largest number of least loaded holders that the amount can bring to one level.
        let (mut sum, mut count) = (u64::from(amount), 0u64);
        for &(load, _) in &self.order {
            if count > 0 && load * count >= sum {
                break;
            }
            sum += load;
            count += 1;
        }
        let (height, mut extra) = (sum / count, sum % count);
        for &(load, i) in &self.order[..count as usize] {
            let top = height + u64::from(extra > 0);
            extra = extra.saturating_sub(1);
            let edge = first + i as usize;
            self.edges[edge] += (top - load) as u32;
            self.groups[self.group_of[edge] as usize].flow += (top - load) as u32;
            self.loads[holders[i as usize] as usize] = top;
        }
    }

    /// Pushes load away from ranks above the target until none is. Returns the target, raised where it had to be.
    fn balance(&mut self, layout: &Layout, target: u64, prices: Prices) -> u64 {
        for _ in 0..SWEEPS {
            if self.loads.iter().all(|&load| load <= target) {
                return target;
            }
            self.sweep(layout);
        }
        let mut search = std::mem::take(&mut self.search);
        let target = search.balance(self, layout, target, prices);
        self.search = search;
        target
    }

    /// Levels what each expert's holders on one node compute of others' tokens, given all other flows.
    fn sweep(&mut self, layout: &Layout) {
        for group in 0..self.groups.len() {
            let edges = self.groups[group].edges();
            if edges.len() < 2 {
                continue;
            }
            let mut sum = 0;
            for edge in edges {
                let others = self.edges[edge] - self.own[edge];
                self.edges[edge] = self.own[edge];
                self.loads[layout.holders()[edge] as usize] -= u64::from(others);
                sum += others;
            }
            self.groups[group].flow -= sum;
            self.fill(sum, group..group + 1, layout);
        }
    }
}
