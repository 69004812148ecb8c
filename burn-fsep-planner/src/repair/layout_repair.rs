use std::ops::Range;

use super::{RepairConfig, exchange::exchange};
use crate::{
    Layout, PlannerError, RoutingCounts, Topology,
    dispatch::Flow,
    placement::{Packing, Part},
};

/// Changes slots of a layout so that exact counts balance.
///
/// A pure function of its arguments, so all ranks repair alike without talking. The ranks above the goal, and as many of the
/// least loaded ones as can take what they have too much, are packed anew from what they compute together; so are twice as
/// many, and so on up to all: a new layout from the exact counts. Each of these is tried with at most one new expert a rank,
/// then with two, four and so on, as the rank that receives most is what ranks wait for. Where that does not reach the goal,
/// the lowest maximum is searched that it reaches. Of all these layouts the one is taken that saves most: three passes of
/// compute on the slowest rank (forward and backward), less the transfer ([`RepairConfig::transfer_seconds`]); of those
/// that save the same, the one that changes fewest slots.
///
/// Where every node holds all experts and has no more tokens than others, nodes are repaired by themselves, so that tokens
/// need not cross nodes.
#[derive(Debug, Clone)]
pub struct LayoutRepair {
    config: RepairConfig,
    flow: Flow,
    packing: Packing,
    /// What each rank computes in the flow. Shape `[N]`.
    loads: Vec<u64>,
    /// What each slot computes in it. Shape `[N, C]`.
    shares: Vec<u64>,
    /// The slots that are tried. Shape `[N, C]`.
    table: Vec<u32>,
}

/// Imbalance that a repair aims at: what the dispatcher leaves anyway.
const GOAL: f64 = 1.004;
/// Halvings of the interval in which the lowest maximum is searched that so many new experts reach.
const HALVINGS: usize = 5;

/// The best layout so far.
struct Best {
    /// Seconds that it saves.
    gain: f64,
    moved: usize,
    layout: Layout,
}

impl LayoutRepair {
    /// Repairs with these costs.
    ///
    /// # Errors
    ///
    /// As [`RepairConfig::check`].
    pub fn new(config: RepairConfig) -> Result<Self, PlannerError> {
        config.check()?;
        let (flow, packing) = (Flow::default(), Packing::default());
        Ok(Self { config, flow, packing, loads: Vec::new(), shares: Vec::new(), table: Vec::new() })
    }

    /// The repaired layout; `None` if the layout is balanced enough or no change pays.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Shape`] if sizes disagree.
    pub fn repair(
        &mut self,
        topology: &Topology,
        layout: &Layout,
        counts: &RoutingCounts,
    ) -> Result<Option<Layout>, PlannerError> {
        layout.check_fits(topology, counts)?;
        let (ranks, total) = (topology.world_size(), counts.total());
        let at = |imbalance: f64| total.div_ceil(ranks as u64).max((total as f64 / ranks as f64 * imbalance) as u64);
        let level = at(self.config.tolerance.min(GOAL));
        let all = 0..ranks;
        let whole = std::slice::from_ref(&all);
        self.spread(layout, counts, whole)?;
        let before = self.max_load();
        if before <= at(self.config.tolerance) {
            return Ok(None);
        }
        let mut best = None;
        if let Some(nodes) = local_groups(topology, layout, counts, level) {
            self.spread(layout, counts, &nodes)?;
            if self.try_groups(topology, layout, &nodes, (before, level), &mut best)? {
                return Ok(best.map(|best| best.layout));
            }
            self.spread(layout, counts, whole)?;
        }
        self.try_groups(topology, layout, whole, (before, level), &mut best)?;
        Ok(best.map(|best| best.layout))
    }

    /// Tries layouts of these groups with growing numbers of new experts a rank. Returns whether one reaches the level.
    fn try_groups(
        &mut self,
        topology: &Topology,
        layout: &Layout,
        groups: &[Range<usize>],
        (before, level): (u64, u64),
        best: &mut Option<Best>,
    ) -> Result<bool, PlannerError> {
        let slots = layout.slots_per_rank();
        let mut most_new = 1;
        loop {
            if self.pack(layout, groups, level, most_new) {
                self.consider(topology, layout, (before, level), best)?;
                return Ok(true);
            }
            // Where transfers are free, only the most counts.
            if self.config.bytes_per_expert > 0.0 || most_new == slots {
                let (mut low, mut high) = (level, before);
                for _ in 0..HALVINGS {
                    let middle = low + (high - low) / 2;
                    if self.pack(layout, groups, middle, most_new) {
                        self.consider(topology, layout, (before, middle), best)?;
                        high = middle;
                    } else {
                        low = middle;
                    }
                }
                let reached = self.exchange(layout, level, most_new);
                self.consider(topology, layout, (before, reached), best)?;
            }
            if most_new == slots {
                return Ok(false);
            }
            most_new = (2 * most_new).min(slots);
        }
    }

    /// Packs the ranks above the level anew, in `table`, with as many of the least loaded ranks of their group as lets most
    /// slots stay. Returns whether no rank is above the level then.
    fn pack(&mut self, layout: &Layout, groups: &[Range<usize>], level: u64, most_new: usize) -> bool {
        let slots = layout.slots_per_rank();
        self.table.clear();
        self.table.extend_from_slice(layout.as_slice());
        for group in groups {
            let loads = &self.loads;
            let mut order: Vec<usize> = group.clone().collect();
            order.sort_by_key(|&rank| {
                if loads[rank] > level { (0, u64::MAX - loads[rank], rank) } else { (1, loads[rank], rank) }
            });
            let over = order.iter().take_while(|&&rank| loads[rank] > level).count();
            if over == 0 {
                continue;
            }
            let mut sum = 0;
            let fits = |(i, &rank): (usize, &usize)| {
                sum += loads[rank];
                i + 1 >= over && sum <= (i as u64 + 1) * level
            };
            let Some(fewest) = order.iter().enumerate().position(fits) else { return false };
            let mut best: Option<(usize, Vec<u32>)> = None;
            let mut size = fewest + 1;
            loop {
                let part = Part { ranks: &order[..size], group: group.clone(), level, most_new };
                let is_packed = self.packing.pack(&mut self.table, layout, &self.shares, part);
                let rows = group.start * slots..group.end * slots;
                let table = &mut self.table[rows.clone()];
                if is_packed {
                    let moved =
                        table.iter().zip(&layout.as_slice()[rows.clone()]).filter(|(new, old)| new != old).count();
                    if best.as_ref().is_none_or(|(fewest, _)| moved < *fewest) {
                        best = Some((moved, table.to_vec()));
                    }
                }
                table.copy_from_slice(&layout.as_slice()[rows]);
                if size == order.len() {
                    break;
                }
                size = (2 * size).min(order.len());
            }
            let Some((_, rows)) = best else { return false };
            self.table[group.start * slots..group.end * slots].copy_from_slice(&rows);
        }
        true
    }

    /// Exchanges slots, in `table`. Returns the largest load that is left.
    fn exchange(&mut self, layout: &Layout, level: u64, most_new: usize) -> u64 {
        self.table.clear();
        self.table.extend_from_slice(layout.as_slice());
        let (mut loads, mut shares) = (self.loads.clone(), self.shares.clone());
        exchange(&mut self.table, &mut loads, &mut shares, layout, level, most_new)
    }

    /// Takes the layout in `table` if it saves more than the best so far.
    fn consider(
        &self,
        topology: &Topology,
        layout: &Layout,
        (before, after): (u64, u64),
        best: &mut Option<Best>,
    ) -> Result<(), PlannerError> {
        let table = self.table.clone();
        let changed = Layout::new(layout.num_ranks(), layout.slots_per_rank(), layout.num_experts(), table)?;
        let saved = self.config.saved_seconds(before, after);
        let received = changed.received_slots(layout);
        let gain = saved - self.config.transfer_seconds(topology, &received);
        let moved = received.iter().sum();
        let is_better = |best: &Best| gain > best.gain || (gain == best.gain && moved < best.moved);
        if gain > 0.0 && best.as_ref().is_none_or(is_better) {
            *best = Some(Best { gain, moved, layout: changed });
        }
        Ok(())
    }

    /// Finds what ranks and slots compute if tokens move within groups only and loads are as even as can be.
    fn spread(&mut self, layout: &Layout, counts: &RoutingCounts, groups: &[Range<usize>]) -> Result<(), PlannerError> {
        let (slots, experts) = (layout.slots_per_rank(), layout.num_experts());
        let tolerance = self.config.tolerance.min(GOAL) - 1.0;
        self.loads.clear();
        self.shares.clear();
        for group in groups {
            let ranks = group.len();
            let part = layout.as_slice()[group.start * slots..group.end * slots].to_vec();
            let part = Layout::new(ranks, slots, experts, part)?;
            let totals = counts.totals_of(group.clone());
            self.flow.solve_totals(&part, &totals, &Topology::single_node(ranks)?, tolerance);
            self.loads.extend_from_slice(&self.flow.loads);
            for rank in 0..ranks {
                let share = |slot| u64::from(self.flow.edges[self.flow.edge_of(&part, rank, slot)]);
                self.shares.extend((0..slots).map(share));
            }
        }
        Ok(())
    }

    fn max_load(&self) -> u64 {
        self.loads.iter().copied().max().unwrap_or(0)
    }
}

/// The nodes' ranks, if every node holds all experts and none has more tokens than its ranks can compute at this level.
fn local_groups(topology: &Topology, layout: &Layout, counts: &RoutingCounts, level: u64) -> Option<Vec<Range<usize>>> {
    if topology.num_nodes() == 1 {
        return None;
    }
    let nodes: Vec<Range<usize>> = (0..topology.num_nodes()).map(|node| topology.ranks_of(node)).collect();
    let holds = |node: &Range<usize>, expert: usize| {
        let holders = layout.ranks_of(expert);
        holders.get(holders.partition_point(|&r| (r as usize) < node.start)).is_some_and(|&r| (r as usize) < node.end)
    };
    let is_local = |node: &Range<usize>| {
        (0..layout.num_experts()).all(|expert| holds(node, expert))
            && counts.totals_of(node.clone()).iter().sum::<u64>() <= node.len() as u64 * level
    };
    nodes.iter().all(is_local).then_some(nodes)
}
