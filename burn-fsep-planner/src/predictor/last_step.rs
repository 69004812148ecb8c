use super::{Predictor, base::check_sizes};
use crate::{PlannerError, RoutingCounts, state};

/// The next step is like the last.
#[derive(Debug, Clone, Default)]
pub struct LastStep {
    last: Option<RoutingCounts>,
}

impl LastStep {
    /// A predictor that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Predictor for LastStep {
    fn name(&self) -> &'static str {
        "last-step"
    }

    fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
        check_sizes(self.last.as_ref(), counts)?;
        self.last = Some(counts.clone());
        Ok(())
    }

    fn predict(&self) -> Option<RoutingCounts> {
        self.last.clone()
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        state::put(state, &self.last)
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        self.last = state::take(state)?;
        Ok(())
    }
}
