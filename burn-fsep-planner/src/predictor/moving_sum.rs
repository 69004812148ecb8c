use super::{Predictor, history::History};
use crate::{PlannerError, RoutingCounts};

/// The next step is like the mean of the last few: the paper's predictor, which sums the last 5 (LAER-MoE, section
/// 3.3).
#[derive(Debug, Clone)]
pub struct MovingSum {
    history: History,
}

impl MovingSum {
    /// A predictor over the last `window` steps.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if `window` is 0.
    pub fn new(window: usize) -> Result<Self, PlannerError> {
        Ok(Self { history: History::new(window, "window of the moving sum")? })
    }
}

impl Default for MovingSum {
    fn default() -> Self {
        Self { history: History::of_window(5) }
    }
}

impl Predictor for MovingSum {
    fn name(&self) -> &'static str {
        "moving-sum"
    }

    fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
        self.history.observe(counts)
    }

    fn predict(&self) -> Option<RoutingCounts> {
        let history = self.history.steps();
        let last = history.back()?;
        // The mean, not the sum: the same layout, and no overflow.
        let steps = history.len() as u64;
        let mean = (0..last.as_slice().len())
            .map(|i| {
                let sum: u64 = history.iter().map(|counts| u64::from(counts.as_slice()[i])).sum();
                ((sum + steps / 2) / steps) as u32
            })
            .collect();
        // Rounding up may exceed what counts can hold, if they are that large.
        let mean = RoutingCounts::new(last.num_ranks(), last.num_experts(), mean);
        Some(mean.unwrap_or_else(|_| last.clone()))
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
    fn the_window_moves() {
        let counts = |a: u32, b: u32| RoutingCounts::new(1, 2, vec![a, b]).unwrap();
        let mut predictor = MovingSum::new(2).unwrap();
        assert_eq!(predictor.predict(), None);
        for step in [counts(100, 0), counts(4, 2), counts(6, 5)] {
            predictor.observe(&step).unwrap();
        }
        assert_eq!(predictor.predict(), Some(counts(5, 4)));
        assert!(MovingSum::new(0).is_err());
    }
}
