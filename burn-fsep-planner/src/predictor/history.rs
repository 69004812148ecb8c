use std::collections::VecDeque;

use super::base::check_sizes;
use crate::{PlannerError, RoutingCounts, state};

/// The last few steps, all of the same sizes; at most `window`.
#[derive(Debug, Clone)]
pub(super) struct History {
    window: usize,
    /// Oldest first.
    steps: VecDeque<RoutingCounts>,
}

impl History {
    /// An empty history of at most `window` steps; `what` names it in the error for 0.
    pub fn new(window: usize, what: &'static str) -> Result<Self, PlannerError> {
        if window == 0 {
            return Err(PlannerError::Zero { what });
        }
        Ok(Self::of_window(window))
    }

    /// An empty history of at most `window` steps, which is not 0.
    pub const fn of_window(window: usize) -> Self {
        Self { window, steps: VecDeque::new() }
    }

    pub fn steps(&self) -> &VecDeque<RoutingCounts> {
        &self.steps
    }

    /// Takes the counts of a step, and forgets the oldest where there are more than `window`.
    pub fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
        check_sizes(self.steps.back(), counts)?;
        if self.steps.len() == self.window {
            self.steps.pop_front();
        }
        self.steps.push_back(counts.clone());
        Ok(())
    }

    pub fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        state::put(state, &self.steps)
    }

    pub fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        let steps: VecDeque<RoutingCounts> = state::take(state)?;
        if steps.len() > self.window || steps.iter().any(|counts| check_sizes(steps.back(), counts).is_err()) {
            let reason = format!("it has no history of at most {} steps of the same sizes", self.window);
            return Err(PlannerError::State(reason));
        }
        self.steps = steps;
        Ok(())
    }
}
