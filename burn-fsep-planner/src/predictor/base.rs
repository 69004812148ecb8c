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

/// Predictors see counts of one size.
pub(super) fn check_sizes(last: Option<&RoutingCounts>, counts: &RoutingCounts) -> Result<(), PlannerError> {
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
    use crate::predictor::{Adaptive, LastStep, MovingAverage, MovingSum, Recurring};

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
