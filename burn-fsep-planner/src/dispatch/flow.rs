use std::collections::VecDeque;

use crate::{Layout, RoutingCounts, Topology};

/// How much of each expert each of its holders computes, and the search for the flow with the smallest maximum load.
///
/// All buffers are reused from call to call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flow {
    /// Flow on each edge (expert, holder), in the layout's order of holders. Shape `[N * C]`.
    pub edges: Vec<u32>,
    /// First edge of each expert. Shape `[E + 1]`.
    pub starts: Vec<u32>,
    /// Load of each rank. Shape `[N]`.
    pub loads: Vec<u64>,
    /// Edges of each rank by slot. Shape `[N, C]`.
    of_rank: Vec<u32>,
    /// Assignments of one node to each expert. Shape `[E]`.
    supply: Vec<u32>,
    order: Vec<(u64, u32)>,
    search: Search,
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

/// Passes in which each expert's flow is levelled by itself before chains are searched.
const SWEEPS: usize = 2;

impl Flow {
    /// The flow of `counts` over `layout` whose maximum load is the smallest possible, or at most
    /// `(1 + tolerance) * mean` if that is more.
    ///
    /// It starts with every token on its own node where that holds the expert, and is then repaired: as long as a rank
    /// exceeds the target, load is pushed along a shortest chain of shared experts to a rank below it, within nodes
    /// first. If no such rank can be reached, the ranks that were reached compute only experts that stand on no other
    /// rank; so their mean load bounds the maximum from below and becomes the target. The target never exceeds what it
    /// started with unless it is such a bound, hence the result.
    pub fn solve(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts, tolerance: f64) {
        self.prepare(layout);
        self.start(topology, layout, counts);
        let total: u64 = self.loads.iter().sum();
        let mean = total as f64 / self.loads.len() as f64;
        let target = total.div_ceil(self.loads.len() as u64).max((mean * (1.0 + tolerance)) as u64);
        for _ in 0..SWEEPS {
            if self.loads.iter().all(|&load| load <= target) {
                return;
            }
            self.sweep(topology, layout);
        }
        self.balance(topology, layout, target);
    }

    /// As [`Flow::solve`] on one node, from the experts' totals alone: enough to judge a layout.
    pub fn solve_totals(&mut self, layout: &Layout, totals: &[u64], node: &Topology, tolerance: f64) -> u64 {
        self.prepare(layout);
        let total: u64 = totals.iter().sum();
        for (expert, &load) in totals.iter().enumerate() {
            self.level(load as u32, layout.ranks_of(expert), self.starts[expert] as usize);
        }
        let mean = total as f64 / self.loads.len() as f64;
        let target = total.div_ceil(self.loads.len() as u64).max((mean * (1.0 + tolerance)) as u64);
        for _ in 0..SWEEPS {
            if self.loads.iter().all(|&load| load <= target) {
                break;
            }
            self.sweep(node, layout);
        }
        self.balance(node, layout, target);
        self.loads.iter().copied().max().unwrap_or(0)
    }

    /// Sets sizes and forgets what was.
    fn prepare(&mut self, layout: &Layout) {
        let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
        self.edges.clear();
        self.edges.resize(ranks * slots, 0);
        self.loads.clear();
        self.loads.resize(ranks, 0);
        self.of_rank.clear();
        self.of_rank.resize(ranks * slots, 0);
        self.starts.clear();
        self.starts.push(0);
        let mut edge = 0;
        for expert in 0..layout.num_experts() {
            for &rank in layout.ranks_of(expert) {
                let slot = layout.slot_of(rank as usize, expert).unwrap_or_default();
                self.of_rank[rank as usize * slots + slot] = edge;
                edge += 1;
            }
            self.starts.push(edge);
        }
    }

    /// Every token on its own node where that holds the expert, else anywhere.
    fn start(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts) {
        for node in 0..topology.num_nodes() {
            let ranks = topology.ranks_of(node);
            let mut supply = std::mem::take(&mut self.supply);
            supply.clear();
            supply.resize(layout.num_experts(), 0);
            for source in ranks.clone() {
                for (supply, &n) in supply.iter_mut().zip(counts.row(source)) {
                    *supply += n;
                }
            }
            for (expert, &supply) in supply.iter().enumerate() {
                let holders = layout.ranks_of(expert);
                let local = on_node(holders, &ranks);
                let group = if local.is_empty() { 0..holders.len() } else { local };
                let edge = self.starts[expert] as usize + group.start;
                self.level(supply, &holders[group], edge);
            }
            self.supply = supply;
        }
    }

    /// Levels each expert's flow among its holders of one node, given all other flows.
    fn sweep(&mut self, topology: &Topology, layout: &Layout) {
        for expert in 0..layout.num_experts() {
            let holders = layout.ranks_of(expert);
            let mut at = 0;
            while at < holders.len() {
                let group = on_node(holders, &topology.ranks_of(topology.node_of(holders[at] as usize)));
                at = group.end;
                if group.len() < 2 {
                    continue;
                }
                let first = self.starts[expert] as usize + group.start;
                let mut sum = 0;
                for (flow, &rank) in self.edges[first..first + group.len()].iter_mut().zip(&holders[group.clone()]) {
                    self.loads[rank as usize] -= u64::from(*flow);
                    sum += *flow;
                    *flow = 0;
                }
                self.level(sum, &holders[group], first);
            }
        }
    }

    /// Adds `supply` to the flow of `holders`, whose edges start at `edge`: raises the least loaded to one level.
    fn level(&mut self, supply: u32, holders: &[u32], edge: usize) {
        if supply == 0 {
            return;
        }
        if let [holder] = holders {
            self.edges[edge] += supply;
            self.loads[*holder as usize] += u64::from(supply);
            return;
        }
        self.order.clear();
        self.order.extend(holders.iter().enumerate().map(|(i, &r)| (self.loads[r as usize], i as u32)));
        self.order.sort_unstable();
        // The largest number of least loaded holders that the supply can bring to one level.
        let (mut sum, mut count) = (u64::from(supply), 0u64);
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
            self.edges[edge + i as usize] += (top - load) as u32;
            self.loads[holders[i as usize] as usize] = top;
        }
    }

    /// Pushes load away from ranks above the target until none is; raises the target where it must.
    fn balance(&mut self, topology: &Topology, layout: &Layout, mut target: u64) {
        let mut within_nodes = topology.num_nodes() > 1;
        while self.loads.iter().any(|&load| load > target) {
            match self.find_spare(topology, layout, target, within_nodes) {
                Some(rank) => self.push(rank, target),
                None if within_nodes => within_nodes = false,
                None => {
                    let reached = self.loads.iter().zip(&self.search.visited).filter(|(_, visited)| **visited);
                    let (sum, count) = reached.fold((0, 0), |(sum, count), (&load, _)| (sum + load, count + 1));
                    target = sum.div_ceil(count);
                }
            }
        }
    }

    /// The nearest rank below the target that some rank above it can pass load to.
    fn find_spare(&mut self, topology: &Topology, layout: &Layout, target: u64, within_nodes: bool) -> Option<usize> {
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
            let node = topology.ranks_of(topology.node_of(rank as usize));
            for (slot, &expert) in row.iter().enumerate() {
                let edge = self.of_rank[rank as usize * slots + slot];
                // Within nodes an expert is a different one on each node.
                if (search.seen_expert[expert as usize] && !within_nodes) || self.edges[edge as usize] == 0 {
                    continue;
                }
                search.seen_expert[expert as usize] = true;
                let first = self.starts[expert as usize];
                let holders = layout.ranks_of(expert as usize);
                let group = if within_nodes { on_node(holders, &node) } else { 0..holders.len() };
                for i in group {
                    let holder = holders[i] as usize;
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
            amount = amount.min(u64::from(self.edges[from as usize]));
            rank = self.search.previous[rank] as usize;
        }
        amount = amount.min(self.loads[rank] - target);
        self.loads[rank] -= amount;
        self.loads[spare] += amount;
        let mut rank = spare;
        while let Some((from, to)) = self.search.reached_by[rank] {
            self.edges[from as usize] -= amount as u32;
            self.edges[to as usize] += amount as u32;
            rank = self.search.previous[rank] as usize;
        }
    }
}

/// The part of ascending `holders` that stands on a node.
pub(super) fn on_node(holders: &[u32], node: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    holders.partition_point(|&r| (r as usize) < node.start)..holders.partition_point(|&r| (r as usize) < node.end)
}
