use std::sync::{Arc, Weak};

use burn_fsep_planner::BackgroundPlanner;
use parking_lot::RwLock;

/// The planner that is given the routing counts of training passes, and of which passes.
#[derive(Default)]
pub(super) struct ObservedSteps(RwLock<Observed>);

#[derive(Default)]
struct Observed {
    /// Whether a step is under way; `None` for programs that do not tell.
    in_step: Option<bool>,
    planner: Weak<BackgroundPlanner>,
}

impl ObservedSteps {
    /// A step begins: from now on, nothing is observed between steps.
    pub fn begin(&self) {
        self.0.write().in_step = Some(true);
    }

    /// A step ends, if one had begun.
    pub fn end(&self) {
        let mut observed = self.0.write();
        observed.in_step = observed.in_step.map(|_| false);
    }

    /// Returns whether it could be set: there is one at a time.
    #[must_use]
    pub fn set_planner(&self, planner: Weak<BackgroundPlanner>) -> bool {
        let mut observed = self.0.write();
        let is_free = observed.planner.strong_count() == 0;
        if is_free {
            observed.planner = planner;
        }
        is_free
    }

    /// Whether a training pass that runs now is part of a step.
    pub fn is_observing(&self) -> bool {
        self.0.read().in_step != Some(false)
    }

    /// The planner, if there is one.
    pub fn planner(&self) -> Option<Arc<BackgroundPlanner>> {
        self.0.read().planner.upgrade()
    }
}
