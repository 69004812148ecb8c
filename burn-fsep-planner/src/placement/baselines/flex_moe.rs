use std::cmp::Reverse;

use super::replicas::PerReplica;
use crate::{
    Layout, PlannerError, RoutingCounts, Topology,
    cost::CostConstants,
    placement::{LayoutRequest, LayoutSolver},
};

/// FlexMoE's placement (arXiv 2304.03946), a baseline: the layout in use is adapted by a few slot changes a step.
///
/// A change *expands* the expert with the most load per replica and *shrinks* the one with the least: the slot of a
/// replica of the latter goes to the former. It is made if it lowers the estimated time of the layer. If it does not, the
/// hottest experts of the busiest rank and a few other cold ones are tried; if none helps, the step ends. There are few
/// changes a step since each moves an expert with its optimizer state; how many is a setting.
///
/// As in the paper an expert's tokens are split evenly over its replicas. Where several ranks are equally busy no single
/// change lowers the maximum; so that it does not stop there, a change that keeps it and evens out the other ranks counts
/// as an improvement.
#[derive(Debug, Clone)]
pub struct FlexMoe {
    constants: CostConstants,
    changes: Option<usize>,
}

/// By default, one slot in this many may change in a step.
const SLOTS_PER_CHANGE: usize = 8;
/// Hot and cold experts that are tried for a change.
const TRIED: usize = 4;

impl FlexMoe {
    /// A solver that estimates times with these constants, and changes up to one slot in eight a step.
    ///
    /// # Errors
    ///
    /// As [`CostConstants::check`].
    pub fn new(constants: CostConstants) -> Result<Self, PlannerError> {
        constants.check()?;
        Ok(Self { constants, changes: None })
    }

    /// Sets how many slots may change in a step.
    pub fn with_changes(mut self, changes: usize) -> Self {
        self.changes = Some(changes);
        self
    }
}

impl Default for FlexMoe {
    fn default() -> Self {
        Self { constants: CostConstants::paper_mixtral_8x7b(), changes: None }
    }
}

impl LayoutSolver for FlexMoe {
    fn name(&self) -> &'static str {
        "flex-moe"
    }

    fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
        request.check()?;
        let LayoutRequest { topology, slots_per_rank: slots, predicted, previous } = *request;
        let (ranks, experts) = (topology.world_size(), predicted.num_experts());
        let start = match previous {
            Some(layout) => layout.clone(),
            None => Layout::static_ep(ranks, slots, experts)?,
        };
        let mut estimate = Estimate::new(topology, &start, predicted, self.constants);
        let mut table = start.as_slice().to_vec();
        for _ in 0..self.changes.unwrap_or((ranks * slots / SLOTS_PER_CHANGE).max(1)) {
            let Some((rank, hot, cold)) = estimate.improve() else { break };
            let row = &mut table[rank * slots..(rank + 1) * slots];
            if let Some(slot) = row.iter_mut().find(|expert| **expert as usize == cold) {
                *slot = hot as u32;
            }
        }
        Layout::new(ranks, slots, experts, table)
    }
}

/// What each rank computes, sends and receives under even split, kept up to date from change to change.
#[derive(Debug)]
struct Estimate<'a> {
    topology: &'a Topology,
    counts: &'a RoutingCounts,
    constants: CostConstants,
    loads: Vec<u64>,
    /// Ranks of each expert, ascending.
    holders: Vec<Vec<usize>>,
    ranks: Vec<RankWork>,
}

/// Tokens of a rank.
#[derive(Debug, Clone, Copy, Default)]
struct RankWork {
    computed: f64,
    /// Sent and received within the node, sent and received between nodes.
    ports: [f64; 4],
}

/// How much the time may rise, relatively, by a change that evens out the loads: what a few more tokens on the wire cost.
const SAME_TIME: f64 = 1e-3;

impl<'a> Estimate<'a> {
    fn new(topology: &'a Topology, layout: &Layout, counts: &'a RoutingCounts, constants: CostConstants) -> Self {
        let holders: Vec<Vec<usize>> = (0..layout.num_experts())
            .map(|expert| layout.ranks_of(expert).iter().map(|&rank| rank as usize).collect())
            .collect();
        let ranks = vec![RankWork::default(); topology.world_size()];
        let mut estimate = Self { topology, counts, constants, loads: counts.expert_totals(), holders, ranks };
        for expert in 0..layout.num_experts() {
            estimate.add(expert, 1.0);
        }
        estimate
    }

    /// Adds (`sign` 1) or takes away (-1) the work of an expert: each source splits evenly over the replicas on its node,
    /// or over all if there are none.
    fn add(&mut self, expert: usize, sign: f64) {
        let Self { topology, counts, holders, ranks, .. } = self;
        let holders = &holders[expert];
        let mut homeless = 0.0;
        for node in 0..topology.num_nodes() {
            let members = topology.ranks_of(node);
            let total: f64 = members.clone().map(|source| f64::from(counts.get(source, expert))).sum();
            let local = holders.partition_point(|&r| r < members.start)..holders.partition_point(|&r| r < members.end);
            let local = &holders[local];
            if local.is_empty() {
                homeless += total;
                for source in members {
                    ranks[source].ports[2] += sign * f64::from(counts.get(source, expert));
                }
                continue;
            }
            let share = sign / local.len() as f64;
            for source in members {
                let own = f64::from(u8::from(local.contains(&source)));
                ranks[source].ports[0] +=
                    sign * f64::from(counts.get(source, expert)) - own * share * f64::from(counts.get(source, expert));
            }
            for &rank in local {
                ranks[rank].computed += share * total;
                ranks[rank].ports[1] += share * (total - f64::from(counts.get(rank, expert)));
            }
        }
        let share = sign / holders.len() as f64;
        for &rank in holders {
            ranks[rank].computed += share * homeless;
            ranks[rank].ports[3] += share * homeless;
        }
    }

    /// Seconds of the layer: four All-to-Alls that end with the busiest port, three passes that end with the busiest rank.
    /// And the sum of squared loads, which tells how even the ranks are.
    fn seconds(&self) -> (f64, f64) {
        let c = &self.constants;
        let bandwidth = [c.intra_node_bytes_per_second; 2].into_iter().chain([c.inter_node_bytes_per_second; 2]);
        let bandwidth: Vec<f64> = bandwidth.collect();
        let (mut port, mut computed, mut squares) = (0.0f64, 0.0f64, 0.0f64);
        for rank in &self.ranks {
            for (tokens, bandwidth) in rank.ports.iter().zip(&bandwidth) {
                port = port.max(tokens * c.bytes_per_token / bandwidth);
            }
            computed = computed.max(rank.computed);
            squares += rank.computed * rank.computed;
        }
        (4.0 * port + 3.0 * computed * c.seconds_per_assignment, squares)
    }

    /// Makes the first change that helps: gives the rank and the experts expanded and shrunk.
    fn improve(&mut self) -> Option<(usize, usize, usize)> {
        let per_replica = |e: usize| PerReplica { load: self.loads[e], replicas: self.holders[e].len() as u64 };
        let mut order: Vec<usize> = (0..self.loads.len()).collect();
        order.sort_by_key(|&e| (per_replica(e), Reverse(e)));
        let cold: Vec<usize> = order.iter().copied().filter(|&e| self.holders[e].len() > 1).take(TRIED).collect();
        // The hottest expert of all first, then those that the busiest rank computes.
        let loads = |rank: &usize| self.ranks[*rank].computed;
        let busiest = (0..self.ranks.len()).max_by(|a, b| loads(a).total_cmp(&loads(b)).then(b.cmp(a)))?;
        let can_expand = |e: &usize| self.holders[*e].len() < self.ranks.len();
        let mut hot: Vec<usize> = order.iter().copied().rev().filter(can_expand).take(1).collect();
        let on_busiest = order.iter().copied().rev().filter(|e| self.holders[*e].binary_search(&busiest).is_ok());
        hot.extend(on_busiest.filter(can_expand).take(TRIED));
        for &hot in &hot {
            for &cold in cold.iter().filter(|&&cold| cold != hot) {
                // The least loaded rank that holds only the one to shrink.
                let free = self.holders[cold].iter().filter(|rank| self.holders[hot].binary_search(rank).is_err());
                let least =
                    free.min_by(|&&a, &&b| self.ranks[a].computed.total_cmp(&self.ranks[b].computed).then(a.cmp(&b)));
                if let Some(&rank) = least
                    && self.change(rank, hot, cold)
                {
                    return Some((rank, hot, cold));
                }
            }
        }
        None
    }

    /// Makes a change if it helps.
    fn change(&mut self, rank: usize, hot: usize, cold: usize) -> bool {
        let (seconds, squares) = self.seconds();
        self.swap(rank, hot, cold);
        let (changed, changed_squares) = self.seconds();
        let helps = changed < seconds || (changed <= seconds * (1.0 + SAME_TIME) && changed_squares < squares);
        if !helps {
            self.swap(rank, cold, hot);
        }
        helps
    }

    /// Gives a rank one expert in the place of another.
    fn swap(&mut self, rank: usize, put: usize, taken: usize) {
        for expert in [put, taken] {
            self.add(expert, -1.0);
        }
        self.holders[taken].retain(|&holder| holder != rank);
        let place = self.holders[put].partition_point(|&holder| holder < rank);
        self.holders[put].insert(place, rank);
        for expert in [put, taken] {
            self.add(expert, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        cost::{CommunicationModel, CostModel},
        dispatch::{DispatchPlan, Dispatcher, EvenSplit},
        test_cases::cases,
    };

    fn request<'a>(topology: &'a Topology, counts: &'a RoutingCounts, previous: &'a Layout) -> LayoutRequest<'a> {
        let slots_per_rank = previous.slots_per_rank();
        LayoutRequest { topology, slots_per_rank, predicted: counts, previous: Some(previous) }
    }

    #[test]
    fn a_hot_expert_expands_step_by_step() {
        let topology = Topology::single_node(8).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![700, 100, 100, 100]; 8]).unwrap();
        let mut layout = Layout::static_ep(8, 2, 4).unwrap();
        let mut solver = FlexMoe::default().with_changes(1);
        let mut moved = Vec::new();
        for _ in 0..12 {
            let next = solver.solve(&request(&topology, &counts, &layout)).unwrap();
            moved.push(next.moved_slots(&layout));
            layout = next;
        }
        assert_eq!(moved[..4], [1; 4], "until it stands nearly everywhere");
        assert_eq!(moved[11], 0, "then it settles");
        assert!(layout.replicas(0) >= 7, "{layout:?}");
    }

    #[test]
    fn balanced_loads_change_nothing() {
        let topology = Topology::uniform(8, 4).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![100; 4]; 8]).unwrap();
        let layout = Layout::static_ep(8, 2, 4).unwrap();
        assert_eq!(FlexMoe::default().solve(&request(&topology, &counts, &layout)).unwrap(), layout);
    }

    proptest! {
        #[test]
        fn layouts_are_deterministic_and_fit(case in cases(8, 12), changes in 0usize..20) {
            let request = request(&case.topology, &case.counts, &case.layout);
            let mut solver = FlexMoe::default().with_changes(changes);
            let layout = solver.solve(&request).unwrap();
            prop_assert_eq!(&layout, &solver.solve(&request).unwrap());
            prop_assert_eq!(layout.slots_per_rank(), case.layout.slots_per_rank());
            prop_assert!(layout.moved_slots(&case.layout) <= changes);
            FlexMoe::default().solve(&LayoutRequest { previous: None, ..request }).unwrap();
        }

        /// The estimate is the cost model's, but for the rounding of tokens.
        #[test]
        fn the_estimate_is_right(case in cases(8, 8)) {
            let constants = CostConstants::paper_mixtral_8x7b();
            let hundredfold = case.counts.as_slice().iter().map(|n| n * 1000).collect();
            let counts = RoutingCounts::new(case.counts.num_ranks(), case.counts.num_experts(), hundredfold).unwrap();
            let mut plan = DispatchPlan::new();
            EvenSplit::new().dispatch(&case.topology, &case.layout, &counts, &mut plan).unwrap();
            let exact = CostModel::new(constants, CommunicationModel::PortMax).unwrap().layer_seconds(&case.topology, &plan);
            let (seconds, _) = Estimate::new(&case.topology, &case.layout, &counts, constants).seconds();
            prop_assert!((seconds - exact).abs() <= 0.01 * exact, "{seconds} {exact}");
        }
    }
}
