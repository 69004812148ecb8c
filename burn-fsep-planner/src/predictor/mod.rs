//! Predictors: the routing counts of the step to come, from those of past steps.

mod adaptive;
mod last_step;
mod moving_average;
mod moving_sum;
mod recurring;

pub use adaptive::Adaptive;
pub use last_step::LastStep;
pub use moving_average::MovingAverage;
pub use moving_sum::MovingSum;
pub use recurring::Recurring;

use std::collections::VecDeque;

use crate::{PlannerError, RoutingCounts, state};

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

    /// Appends what it has learned to `state`.
    ///
    /// # Errors
    ///
    /// [`PlannerError::State`] if it cannot be written.
    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError>;

    /// Takes from `state` what a predictor that was made like this one has learned; from then on it predicts as that one.
    ///
    /// # Errors
    ///
    /// [`PlannerError::State`] if that is not what comes next there.
    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError>;
}

/// Share of assignments that go to another expert in one than in the other: 0 for proportional totals, 1 for disjoint
/// ones. Which source they come from does not count.
fn distance(a: &RoutingCounts, b: &RoutingCounts) -> f64 {
    let (of_a, of_b) = (a.total().max(1) as f64, b.total().max(1) as f64);
    let totals = a.expert_totals().into_iter().zip(b.expert_totals());
    totals.map(|(a, b)| (a as f64 / of_a - b as f64 / of_b).abs()).sum::<f64>() / 2.0
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

/// The past steps that come next in a state: at most `window`, of the same sizes.
fn take_history(state: &mut &[u8], window: usize) -> Result<VecDeque<RoutingCounts>, PlannerError> {
    let history: VecDeque<RoutingCounts> = state::take(state)?;
    if history.len() > window || history.iter().any(|counts| check_sizes(history.back(), counts).is_err()) {
        return Err(PlannerError::State(format!("it has no history of at most {window} steps of the same sizes")));
    }
    Ok(history)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_must_not_change() {
        let first = RoutingCounts::new(1, 2, vec![1, 2]).unwrap();
        let other = RoutingCounts::new(1, 3, vec![1, 2, 3]).unwrap();
        let predictors: [Box<dyn Predictor>; 5] = [
            Box::new(LastStep::new()),
            Box::new(MovingSum::default()),
            Box::new(MovingAverage::default()),
            Box::new(Recurring::default()),
            Box::new(Adaptive::default()),
        ];
        for mut predictor in predictors {
            assert_eq!(predictor.predict(), None, "{}", predictor.name());
            predictor.observe(&first).unwrap();
            assert_eq!(predictor.predict(), Some(first.clone()), "{}", predictor.name());
            assert!(matches!(predictor.observe(&other), Err(PlannerError::Shape { .. })), "{}", predictor.name());
        }
    }

    #[test]
    fn the_largest_counts_are_predicted_too() {
        let steps = [vec![u32::MAX, 0], vec![u32::MAX - 1, 1]].map(|row| RoutingCounts::new(1, 2, row).unwrap());
        let predictors: [Box<dyn Predictor>; 2] =
            [Box::new(MovingSum::default()), Box::new(MovingAverage::new(0.5).unwrap())];
        for mut predictor in predictors {
            steps.iter().for_each(|step| predictor.observe(step).unwrap());
            assert_eq!(predictor.predict().as_ref(), Some(&steps[1]), "{}", predictor.name());
        }
    }
}
