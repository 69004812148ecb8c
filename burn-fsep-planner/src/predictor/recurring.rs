use super::{Predictor, distance::distance, history::History};
use crate::{PlannerError, RoutingCounts};

/// The next step is like the one that followed the past step most like the last: right where routing repeats itself, with
/// the phases of a data mix for example.
#[derive(Debug, Clone)]
pub struct Recurring {
    history: History,
}

impl Recurring {
    /// A predictor that remembers `window` steps, each of 4 bytes a source rank and expert.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if `window` is 0.
    pub fn new(window: usize) -> Result<Self, PlannerError> {
        Ok(Self { history: History::new(window, "window of recurring steps")? })
    }
}

impl Default for Recurring {
    fn default() -> Self {
        Self { history: History::of_window(16) }
    }
}

impl Predictor for Recurring {
    fn name(&self) -> &'static str {
        "recurring"
    }

    fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
        self.history.observe(counts)
    }

    fn predict(&self) -> Option<RoutingCounts> {
        let history = self.history.steps();
        let last = history.back()?;
        // The most recent of those that are equally like it.
        let like = (0..history.len() - 1).rev().min_by(|&a, &b| {
            let far = |step: usize| distance(&history[step], last);
            far(a).total_cmp(&far(b))
        });
        like.map_or(Some(last), |step| history.get(step + 1)).cloned()
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        self.history.save(state)
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        self.history.load(state)
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
