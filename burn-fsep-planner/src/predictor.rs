//! Predictors: the routing counts of the step to come, from those of past steps.

use std::collections::VecDeque;

use crate::{PlannerError, RoutingCounts};

/// Predicts a layer's routing counts. Deterministic: the same history gives the same prediction on every rank.
pub trait Predictor: Send + std::fmt::Debug {
    /// Name for tables and messages.
    fn name(&self) -> &'static str;

    /// Takes the counts of a step.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Shape`] if they are of other sizes than those before.
    fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError>;

    /// The prediction for the next step; `None` before the first observation.
    fn predict(&self) -> Option<RoutingCounts>;
}

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
}

/// The next step is like the mean of the last few: the paper's predictor, which sums the last 5 (LAER-MoE, section
/// 3.3).
#[derive(Debug, Clone)]
pub struct MovingSum {
    window: usize,
    history: VecDeque<RoutingCounts>,
}

impl MovingSum {
    /// A predictor over the last `window` steps.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if `window` is 0.
    pub fn new(window: usize) -> Result<Self, PlannerError> {
        if window == 0 {
            return Err(PlannerError::Zero { what: "window of the moving sum" });
        }
        Ok(Self { window, history: VecDeque::new() })
    }
}

impl Default for MovingSum {
    fn default() -> Self {
        Self { window: 5, history: VecDeque::new() }
    }
}

impl Predictor for MovingSum {
    fn name(&self) -> &'static str {
        "moving-sum"
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
        // The mean, not the sum: the same layout, and no overflow.
        let steps = self.history.len() as u64;
        let mean = (0..last.as_slice().len())
            .map(|i| {
                let sum: u64 = self.history.iter().map(|counts| u64::from(counts.as_slice()[i])).sum();
                ((sum + steps / 2) / steps) as u32
            })
            .collect();
        RoutingCounts::new(last.num_ranks(), last.num_experts(), mean).ok()
    }
}

fn check_sizes(last: Option<&RoutingCounts>, counts: &RoutingCounts) -> Result<(), PlannerError> {
    let Some(last) = last else { return Ok(()) };
    for (what, expected, actual) in [
        ("ranks of the observed counts", last.num_ranks(), counts.num_ranks()),
        ("experts of the observed counts", last.num_experts(), counts.num_experts()),
    ] {
        if expected != actual {
            return Err(PlannerError::Shape { what: what.into(), expected, actual });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(a: u32, b: u32) -> RoutingCounts {
        RoutingCounts::new(1, 2, vec![a, b]).unwrap()
    }

    #[test]
    fn the_window_moves() {
        let mut predictor = MovingSum::new(2).unwrap();
        assert_eq!(predictor.predict(), None);
        for step in [counts(100, 0), counts(4, 2), counts(6, 5)] {
            predictor.observe(&step).unwrap();
        }
        assert_eq!(predictor.predict(), Some(counts(5, 4)));
        assert!(MovingSum::new(0).is_err());
    }

    #[test]
    fn sizes_must_not_change() {
        let other = RoutingCounts::new(1, 3, vec![1, 2, 3]).unwrap();
        for mut predictor in [Box::new(LastStep::new()) as Box<dyn Predictor>, Box::new(MovingSum::default())] {
            predictor.observe(&counts(1, 2)).unwrap();
            assert!(matches!(predictor.observe(&other), Err(PlannerError::Shape { .. })), "{}", predictor.name());
        }
    }
}
