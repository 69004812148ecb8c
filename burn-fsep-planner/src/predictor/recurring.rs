use std::collections::VecDeque;

use super::{Predictor, check_sizes, distance, take_history};
use crate::{PlannerError, RoutingCounts, state};

/// The next step is like the one that followed the past step most like the last: right where routing repeats itself, with
/// the phases of a data mix for example.
#[derive(Debug, Clone)]
pub struct Recurring {
    window: usize,
    history: VecDeque<RoutingCounts>,
}

impl Recurring {
    /// A predictor that remembers `window` steps, each of 4 bytes a source rank and expert.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if `window` is 0.
    pub fn new(window: usize) -> Result<Self, PlannerError> {
        if window == 0 {
            return Err(PlannerError::Zero { what: "window of recurring steps" });
        }
        Ok(Self { window, history: VecDeque::new() })
    }
}

impl Default for Recurring {
    fn default() -> Self {
        Self { window: 16, history: VecDeque::new() }
    }
}

impl Predictor for Recurring {
    fn name(&self) -> &'static str {
        "recurring"
    }

    fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
        check_sizes(self.history.back(), counts)?;
        if self.history.len() == self.window {
            self.history.pop_front();
        }
        self.history.push_back(counts.clone());
        Ok(())
    }

    fn predict(&self) -> Option<RoutingCounts> {
        let last = self.history.back()?;
        // The most recent of those that are equally like it.
        let like = (0..self.history.len() - 1).rev().min_by(|&a, &b| {
            let far = |step: usize| distance(&self.history[step], last);
            far(a).total_cmp(&far(b))
        });
        like.map_or(Some(last), |step| self.history.get(step + 1)).cloned()
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        state::put(state, &self.history)
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        self.history = take_history(state, self.window)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_found() {
        let counts = |step: usize| {
            let row = (0..3).map(|expert| if step % 3 == expert { 90 + step as u32 } else { 10 }).collect();
            RoutingCounts::new(1, 3, row).unwrap()
        };
        let mut predictor = Recurring::default();
        assert_eq!(predictor.predict(), None);
        for step in 0..6 {
            predictor.observe(&counts(step)).unwrap();
            let hottest = |counts: &RoutingCounts| (0..3).max_by_key(|&expert| counts.get(0, expert)).unwrap();
            let predicted = hottest(&predictor.predict().unwrap());
            assert!(step < 3 || predicted == (step + 1) % 3, "after step {step}: {predicted}");
        }
        assert!(Recurring::new(0).is_err());
    }
}
