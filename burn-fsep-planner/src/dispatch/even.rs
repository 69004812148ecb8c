use super::{DispatchPlan, Dispatcher};
use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// The paper's "lite routing": each source rank splits its assignments to an expert evenly over the replicas on its
/// own node, and only if there is none there, evenly over all (LAER-MoE, section 3.4).
///
/// What does not divide goes, one each, to the replicas that follow the source rank's own turn, so that remainders
/// do not pile up on the first replica.
#[derive(Debug, Clone, Default)]
pub struct EvenSplit;

impl EvenSplit {
    /// A dispatcher without state.
    pub fn new() -> Self {
        Self
    }
}

impl Dispatcher for EvenSplit {
    fn name(&self) -> &'static str {
        "even-split"
    }

    fn dispatch(
        &mut self,
        topology: &Topology,
        layout: &Layout,
        counts: &RoutingCounts,
        plan: &mut DispatchPlan,
    ) -> Result<(), PlannerError> {
        layout.check_fits(topology, counts)?;
        plan.clear(counts.num_ranks(), counts.num_experts());
        for source in 0..counts.num_ranks() {
            let node = topology.ranks_of(topology.node_of(source));
            for expert in 0..counts.num_experts() {
                let holders = layout.ranks_of(expert);
                let first = holders.partition_point(|&r| (r as usize) < node.start);
                let last = holders.partition_point(|&r| (r as usize) < node.end);
                let replicas = if first < last { &holders[first..last] } else { holders };
                let (n, len) = (counts.get(source, expert), replicas.len() as u32);
                let turn = source as u32 % len;
                for (i, &rank) in replicas.iter().enumerate() {
                    let place = (i as u32 + len - turn) % len;
                    plan.push(rank as usize, n / len + u32::from(place < n % len));
                }
                plan.end_pair();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_cases::cases;

    proptest! {
        #[test]
        fn plans_are_valid_and_stay_on_the_node_where_they_can(case in cases(8, 8)) {
            let mut plan = DispatchPlan::new();
            EvenSplit::new().dispatch(&case.topology, &case.layout, &case.counts, &mut plan).unwrap();
            plan.check(&case.layout, &case.counts).unwrap();
            for (source, expert, share) in plan.iter() {
                let local = |&r: &u32| case.topology.same_node(source, r as usize);
                let has_local = case.layout.ranks_of(expert).iter().any(local);
                prop_assert_eq!(has_local, local(&share.rank));
            }
        }
    }

    #[test]
    fn stays_on_the_node_where_a_replica_is() {
        let topology = Topology::uniform(4, 2).unwrap();
        let layout = Layout::from_rows(2, &[vec![0], vec![0], vec![0], vec![1]]).unwrap();
        let counts = RoutingCounts::from_rows(&[vec![5, 2], vec![0, 0], vec![7, 0], vec![0, 1]]).unwrap();
        let mut plan = DispatchPlan::new();
        EvenSplit::new().dispatch(&topology, &layout, &counts, &mut plan).unwrap();
        plan.check(&layout, &counts).unwrap();
        assert_eq!(plan.loads(), [3, 2, 7, 3]);
        assert_eq!(plan.cross_node_tokens(&topology), 2);
    }
}
