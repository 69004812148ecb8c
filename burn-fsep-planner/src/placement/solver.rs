use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// What a layout is to be made for.
#[derive(Debug, Clone, Copy)]
pub struct LayoutRequest<'a> {
    /// The ranks and their nodes.
    pub topology: &'a Topology,
    /// Slots a rank `C`.
    pub slots_per_rank: usize,
    /// The routing counts expected in the step that the layout is for.
    pub predicted: &'a RoutingCounts,
    /// The layout in use, if there is one: solvers may prefer to keep its slots.
    pub previous: Option<&'a Layout>,
}

impl LayoutRequest<'_> {
    /// Checks that sizes agree and that all experts fit.
    ///
    /// # Errors
    ///
    /// As [`Layout::check_shape`]; [`PlannerError::Shape`] if the sizes of the request's parts disagree.
    pub fn check(&self) -> Result<(), PlannerError> {
        let num_ranks = self.topology.world_size();
        if self.predicted.num_ranks() != num_ranks {
            return Err(PlannerError::Shape {
                what: "ranks of the predicted counts".into(),
                expected: num_ranks,
                actual: self.predicted.num_ranks(),
            });
        }
        Layout::check_shape(num_ranks, self.slots_per_rank, self.predicted.num_experts())?;
        if let Some(previous) = self.previous {
            for (what, expected, actual) in [
                ("ranks of the previous layout", num_ranks, previous.num_ranks()),
                ("slots of the previous layout", self.slots_per_rank, previous.slots_per_rank()),
                ("experts of the previous layout", self.predicted.num_experts(), previous.num_experts()),
            ] {
                if expected != actual {
                    return Err(PlannerError::Shape { what: what.into(), expected, actual });
                }
            }
        }
        Ok(())
    }
}

/// Chooses a layout for the step to come.
///
/// A solver is deterministic: the same sequence of requests gives the same layouts on every rank.
pub trait LayoutSolver: Send + std::fmt::Debug {
    /// Name for tables and messages.
    fn name(&self) -> &'static str;

    /// The layout for a request.
    ///
    /// # Errors
    ///
    /// As [`LayoutRequest::check`].
    fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError>;

    /// Appends to `state` what its next layouts depend on beside requests; by default nothing.
    ///
    /// # Errors
    ///
    /// [`PlannerError::State`] if it cannot be written.
    fn save(&self, _state: &mut Vec<u8>) -> Result<(), PlannerError> {
        Ok(())
    }

    /// Takes from `state` what a solver that was made like this one has saved; from then on it solves as that one.
    ///
    /// # Errors
    ///
    /// [`PlannerError::State`] if that is not what comes next there.
    fn load(&mut self, _state: &mut &[u8]) -> Result<(), PlannerError> {
        Ok(())
    }
}
