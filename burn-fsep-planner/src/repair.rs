//! Repair of a layout in the step itself, when the exact counts show that it pays.

use crate::{Layout, PlannerError, RoutingCounts, Topology, cost::CostConstants, dispatch::Flow};

/// When a repair pays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RepairConfig {
    /// Constants of cluster and model.
    pub constants: CostConstants,
    /// Bytes of one expert's parameters: what a changed slot receives. 0 where all slots are restored anyway after the
    /// counts are known, so that a repair costs nothing.
    pub bytes_per_expert: f64,
    /// Imbalance up to which nothing is repaired.
    pub tolerance: f64,
    /// Most slots changed in one repair.
    pub max_changes: usize,
}

impl RepairConfig {
    /// Repairs that cost nothing: weights are restored after the counts are known.
    pub fn free() -> Self {
        Self { constants: CostConstants::paper_mixtral_8x7b(), bytes_per_expert: 0.0, tolerance: 1.01, max_changes: 16 }
    }
}

/// Changes few slots of a layout so that exact counts balance.
///
/// A pure function of its arguments, so all ranks repair alike without talking. Of the ranks that wait for nobody, it
/// takes the expert with the most load per replica, gives it another replica on the least loaded rank, in place of the
/// expert there that can spare one best, and goes on while less load is above the goal. Of the layouts on the way it
/// takes the one that saves most: three passes of compute on the slowest rank (forward and backward), less the transfer
/// of the changed experts to the rank that receives most.
#[derive(Debug, Clone)]
pub struct LayoutRepair {
    config: RepairConfig,
    flow: Flow,
}

impl LayoutRepair {
    /// Repairs with these costs.
    ///
    /// # Errors
    ///
    /// [`PlannerError::NotFinite`] for constants that are not positive, or for a tolerance below 1.
    pub fn new(config: RepairConfig) -> Result<Self, PlannerError> {
        config.constants.check()?;
        for (what, value, least) in
            [("bytes_per_expert", config.bytes_per_expert, 0.0), ("tolerance", config.tolerance, 1.0)]
        {
            if !value.is_finite() || value < least {
                return Err(PlannerError::NotFinite { what: format!("{what} (at least {least})"), value });
            }
        }
        Ok(Self { config, flow: Flow::default() })
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
        let goal = (counts.total() as f64 / layout.num_ranks() as f64 * self.config.tolerance) as u64;
        let (before, mut above) = self.solve(topology, layout, counts, goal);
        let mut current = layout.clone();
        let mut best: Option<(f64, Layout)> = None;
        for _ in 0..self.config.max_changes {
            if above == 0 {
                break;
            }
            let Some(next) = self.change_one(&current, counts, goal)? else { break };
            let (max, still_above) = self.solve(topology, &next, counts, goal);
            if still_above >= above {
                break;
            }
            (current, above) = (next, still_above);
            let gain = self.gain(before, max, layout, &current);
            if gain > best.as_ref().map_or(0.0, |(most, _)| *most) {
                best = Some((gain, current.clone()));
            }
        }
        Ok(best.map(|(_, layout)| layout))
    }

    /// Finds the flow; returns its maximum load, and the load above the goal.
    fn solve(&mut self, topology: &Topology, layout: &Layout, counts: &RoutingCounts, goal: u64) -> (u64, u64) {
        self.flow.solve_loads(topology, layout, counts, self.config.tolerance - 1.0);
        let loads = &self.flow.loads;
        (loads.iter().copied().max().unwrap_or(0), loads.iter().map(|load| load.saturating_sub(goal)).sum())
    }

    /// Seconds saved.
    fn gain(&self, before: u64, after: u64, layout: &Layout, changed: &Layout) -> f64 {
        let constants = &self.config.constants;
        let saved = 3.0 * before.saturating_sub(after) as f64 * constants.seconds_per_assignment;
        let received = |rank: usize| {
            let held = layout.experts_of(rank);
            changed.experts_of(rank).iter().filter(|expert| !held.contains(expert)).count()
        };
        let most = (0..layout.num_ranks()).map(received).max().unwrap_or(0);
        saved - most as f64 * self.config.bytes_per_expert / constants.inter_node_bytes_per_second
    }

    /// One more replica for the expert that overloads the ranks above the goal, on the least loaded rank.
    fn change_one(&self, layout: &Layout, counts: &RoutingCounts, goal: u64) -> Result<Option<Layout>, PlannerError> {
        let totals = counts.expert_totals();
        let per_replica = |expert: u32| totals[expert as usize] as f64 / layout.replicas(expert as usize) as f64;
        let loads = &self.flow.loads;
        let mut order: Vec<usize> = (0..layout.num_ranks()).collect();
        order.sort_by_key(|&rank| (loads[rank], rank));
        let over = order.iter().filter(|&&rank| loads[rank] > goal);
        let Some(&hot) = over
            .flat_map(|&rank| layout.experts_of(rank))
            .max_by(|a, b| per_replica(**a).total_cmp(&per_replica(**b)).then(b.cmp(a)))
        else {
            return Ok(None);
        };
        for rank in order {
            if loads[rank] > goal {
                break;
            }
            let row = layout.experts_of(rank);
            if row.contains(&hot) {
                continue;
            }
            // What the others' replicas would have to take over.
            let handed_on =
                |expert: u32| totals[expert as usize] as f64 / (layout.replicas(expert as usize) - 1) as f64;
            let spared = (0..row.len())
                .filter(|&slot| layout.replicas(row[slot] as usize) > 1)
                .min_by(|&a, &b| handed_on(row[a]).total_cmp(&handed_on(row[b])));
            if let Some(slot) = spared {
                let mut table = layout.as_slice().to_vec();
                table[rank * layout.slots_per_rank() + slot] = hot;
                let next = Layout::new(layout.num_ranks(), layout.slots_per_rank(), layout.num_experts(), table)?;
                return Ok(Some(next));
            }
        }
        Ok(None)
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

    fn imbalance(topology: &Topology, layout: &Layout, counts: &RoutingCounts) -> f64 {
        let mut plan = DispatchPlan::new();
        MinMax::exact().dispatch(topology, layout, counts, &mut plan).unwrap();
        plan.max_over_mean()
    }

    fn shifted() -> (Topology, Layout, RoutingCounts) {
        let topology = Topology::single_node(4).unwrap();
        let layout = Layout::from_rows(4, &[vec![0, 1], vec![0, 2], vec![0, 3], vec![1, 2]]).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![5, 15, 15, 65]; 4]).unwrap();
        (topology, layout, counts)
    }

    #[test]
    fn a_sudden_shift_is_repaired_with_few_slots() {
        let (topology, layout, counts) = shifted();
        let mut repair = LayoutRepair::new(RepairConfig::free()).unwrap();
        let repaired = repair.repair(&topology, &layout, &counts).unwrap().unwrap();
        assert!(imbalance(&topology, &layout, &counts) > 2.0);
        assert!(imbalance(&topology, &repaired, &counts) < 1.1, "{repaired:?}");
        assert!(repaired.moved_slots(&layout) <= 3, "{repaired:?}");
    }

    #[test]
    fn a_repair_that_costs_more_than_it_saves_is_left() {
        let (topology, layout, counts) = shifted();
        let config = RepairConfig { bytes_per_expert: 1e12, ..RepairConfig::free() };
        assert_eq!(LayoutRepair::new(config).unwrap().repair(&topology, &layout, &counts).unwrap(), None);
        let config = RepairConfig { tolerance: 0.5, ..RepairConfig::free() };
        assert!(LayoutRepair::new(config).is_err());
    }

    proptest! {
        #[test]
        fn repairs_are_valid_better_and_deterministic(case in cases(8, 10)) {
            let repair = || {
                let mut repair = LayoutRepair::new(RepairConfig::free()).unwrap();
                repair.repair(&case.topology, &case.layout, &case.counts).unwrap()
            };
            let repaired = repair();
            prop_assert_eq!(&repaired, &repair());
            if let Some(layout) = repaired {
                let before = imbalance(&case.topology, &case.layout, &case.counts);
                prop_assert!(imbalance(&case.topology, &layout, &case.counts) < before);
            }
        }
    }
}
