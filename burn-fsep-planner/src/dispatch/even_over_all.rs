use super::{DispatchPlan, Dispatcher, EvenSplit};
use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// The dispatch that EPLB's global policy counts on: every source splits evenly over all replicas of an expert, wherever
/// they stand.
///
/// With [`EvenSplit`], which prefers the source's node, the global policy would look worse than it is: its packing gives
/// each replica the same weight.
#[derive(Debug, Clone, Default)]
pub(crate) struct EvenOverAll;

impl Dispatcher for EvenOverAll {
    fn name(&self) -> &'static str {
        "even-over-all"
    }

    fn dispatch(
        &mut self,
        topology: &Topology,
        layout: &Layout,
        counts: &RoutingCounts,
        plan: &mut DispatchPlan,
    ) -> Result<(), PlannerError> {
        layout.check_fits(topology, counts)?;
        // On one node all replicas are near.
        EvenSplit::new().dispatch(&Topology::single_node(topology.world_size())?, layout, counts, plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_do_not_count() {
        let topology = Topology::uniform(4, 2).unwrap();
        let layout = Layout::from_rows(2, &[vec![0], vec![0], vec![0], vec![1]]).unwrap();
        let counts = RoutingCounts::from_rows(&[vec![6, 0], vec![0, 0], vec![9, 0], vec![0, 1]]).unwrap();
        let mut plan = DispatchPlan::new();
        EvenOverAll.dispatch(&topology, &layout, &counts, &mut plan).unwrap();
        plan.check(&layout, &counts).unwrap();
        assert_eq!(plan.loads(), [5, 5, 5, 1]);
    }
}
