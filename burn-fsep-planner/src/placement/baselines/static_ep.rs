use crate::{
    Layout, PlannerError,
    placement::{LayoutRequest, LayoutSolver},
};

/// Static expert parallelism: the layout never changes.
#[derive(Debug, Clone, Default)]
pub struct StaticEp;

impl LayoutSolver for StaticEp {
    fn name(&self) -> &'static str {
        "static"
    }

    fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
        request.check()?;
        Layout::static_ep(request.topology.world_size(), request.slots_per_rank, request.predicted.num_experts())
    }
}
