use super::DispatchPlan;
use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// Decides `d[s, e, r]` for a step whose routing counts are known and whose layout is fixed.
///
/// A dispatcher is a pure function of its arguments: all ranks call it with the same ones and so agree on the plan
/// without talking. `&mut self` is for buffers that are reused from call to call.
pub trait Dispatcher: Send + std::fmt::Debug {
    /// Name for tables and messages.
    fn name(&self) -> &'static str;

    /// Writes the plan for `counts` over `layout` into `plan`, whose former content is overwritten.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Shape`] if the arguments' sizes disagree.
    fn dispatch(
        &mut self,
        topology: &Topology,
        layout: &Layout,
        counts: &RoutingCounts,
        plan: &mut DispatchPlan,
    ) -> Result<(), PlannerError>;
}
