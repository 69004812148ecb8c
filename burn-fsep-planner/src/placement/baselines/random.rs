use super::{builder::LayoutBuilder, replicas::replicate};
use crate::{
    Layout, PlannerError, SplitMix64,
    placement::{LayoutRequest, LayoutSolver},
    state,
};

/// A baseline that knows how many replicas an expert needs but not where: counts in proportion to load, places at random.
///
/// It shows what placement is worth on top of replica counts.
#[derive(Debug, Clone)]
pub struct RandomPlacement {
    rng: SplitMix64,
}

impl RandomPlacement {
    /// A solver with a seed; each request draws anew.
    pub fn new(seed: u64) -> Self {
        Self { rng: SplitMix64::new(seed) }
    }
}

impl LayoutSolver for RandomPlacement {
    fn name(&self) -> &'static str {
        "random"
    }

    fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
        request.check()?;
        let (ranks, slots) = (request.topology.world_size(), request.slots_per_rank);
        let loads = request.predicted.expert_totals();
        let replicas = replicate(&loads, ranks, ranks * slots);
        let mut dealt: Vec<usize> =
            replicas.iter().enumerate().flat_map(|(expert, &count)| std::iter::repeat_n(expert, count)).collect();
        self.rng.shuffle(&mut dealt);
        let mut builder = LayoutBuilder::new(ranks, slots, loads.len());
        let mut open: Vec<usize> = Vec::with_capacity(ranks);
        for expert in dealt {
            open.clear();
            open.extend((0..ranks).filter(|&rank| builder.can_take(rank, expert)));
            if open.is_empty() {
                // Always possible while an expert has no more replicas than there are ranks.
                let is_placed = builder.put_by_exchange(expert);
                debug_assert!(is_placed);
            } else {
                builder.put(open[self.rng.below(open.len())], expert);
            }
        }
        builder.finish()
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        state::put(state, &self.rng)
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        self.rng = state::take(state)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{RoutingCounts, Topology, test_cases::cases};

    #[test]
    fn seeds_and_requests_differ() {
        let topology = Topology::single_node(16).unwrap();
        let counts = RoutingCounts::from_rows(&vec![(1..=16).collect(); 16]).unwrap();
        let request = LayoutRequest { topology: &topology, slots_per_rank: 2, predicted: &counts, previous: None };
        let mut solver = RandomPlacement::new(1);
        let first = solver.solve(&request).unwrap();
        assert_ne!(first, solver.solve(&request).unwrap());
        assert_ne!(first, RandomPlacement::new(2).solve(&request).unwrap());
        assert!(first.replicas(15) > first.replicas(0));
    }

    proptest! {
        #[test]
        fn layouts_are_deterministic_and_fit(case in cases(8, 12), seed in 0u64..100) {
            let request = LayoutRequest {
                topology: &case.topology,
                slots_per_rank: case.layout.slots_per_rank(),
                predicted: &case.counts,
                previous: Some(&case.layout),
            };
            let layout = RandomPlacement::new(seed).solve(&request).unwrap();
            prop_assert_eq!(&layout, &RandomPlacement::new(seed).solve(&request).unwrap());
            prop_assert_eq!(layout.as_slice().len(), case.layout.as_slice().len());
        }
    }
}
