use super::{LastStep, MovingAverage, MovingSum, Predictor, Recurring, distance::distance};
use crate::{PlannerError, RoutingCounts, state};

/// Chooses among predictors by their past errors: after a jump the last step is the best guess, in noise an average is,
/// and which of them it is may change at any time.
///
/// The error of a step is the share of assignments that were predicted for another expert; errors fade by half in about
/// three steps.
#[derive(Debug)]
pub struct Adaptive {
    predictors: Vec<Box<dyn Predictor>>,
    /// Faded sum of each predictor's errors.
    errors: Vec<f64>,
}

/// What is left of an error a step later.
const FADE: f64 = 0.8;

impl Adaptive {
    /// Chooses among these; the first of those that are equally good.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if there are none.
    pub fn new(predictors: Vec<Box<dyn Predictor>>) -> Result<Self, PlannerError> {
        if predictors.is_empty() {
            return Err(PlannerError::Zero { what: "number of predictors to choose among" });
        }
        let errors = vec![0.0; predictors.len()];
        Ok(Self { predictors, errors })
    }

    /// The predictor that would be used now.
    pub fn chosen(&self) -> &dyn Predictor {
        let best = (0..self.predictors.len()).min_by(|&a, &b| self.errors[a].total_cmp(&self.errors[b]));
        self.predictors[best.unwrap_or_default()].as_ref()
    }
}

impl Default for Adaptive {
    fn default() -> Self {
        let predictors: Vec<Box<dyn Predictor>> = vec![
            Box::new(LastStep::new()),
            Box::new(MovingAverage::default()),
            Box::new(MovingSum::default()),
            Box::new(Recurring::default()),
        ];
        let errors = vec![0.0; predictors.len()];
        Self { predictors, errors }
    }
}

impl Predictor for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }

    fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
        for (predictor, error) in self.predictors.iter_mut().zip(&mut self.errors) {
            let predicted = predictor.predict();
            predictor.observe(counts)?;
            if let Some(predicted) = predicted {
                *error = *error * FADE + distance(&predicted, counts);
            }
        }
        Ok(())
    }

    fn predict(&self) -> Option<RoutingCounts> {
        self.chosen().predict()
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        state::put(state, &self.errors)?;
        self.predictors.iter().try_for_each(|predictor| predictor.save(state))
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        let errors: Vec<f64> = state::take(state)?;
        if errors.len() != self.predictors.len() {
            return Err(PlannerError::State(format!("{} predictors, not {}", errors.len(), self.predictors.len())));
        }
        self.errors = errors;
        self.predictors.iter_mut().try_for_each(|predictor| predictor.load(state))?;
        // All have seen the same steps.
        let mut predictions = self.predictors.iter().map(|predictor| predictor.predict());
        let sizes = |counts: RoutingCounts| (counts.num_ranks(), counts.num_experts());
        let first = predictions.next().flatten().map(sizes);
        if predictions.any(|prediction| prediction.map(sizes) != first) || self.errors.iter().any(|e| !e.is_finite()) {
            return Err(PlannerError::State("its predictors have not seen the same steps".into()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(a: u32, b: u32) -> RoutingCounts {
        RoutingCounts::new(1, 2, vec![a, b]).unwrap()
    }

    #[test]
    fn noise_is_averaged_and_a_jump_is_followed() {
        let mut predictor = Adaptive::default();
        assert_eq!(predictor.predict(), None);
        let noise = [7, 2, 9, 1, 5, 8, 3, 6, 4, 9, 2, 7, 1, 8, 5, 3];
        for n in noise {
            predictor.observe(&counts(50 + n, 60 - n)).unwrap();
        }
        assert!(predictor.chosen().name().starts_with("moving"), "{}", predictor.chosen().name());
        for _ in 0..2 {
            predictor.observe(&counts(1000, 10)).unwrap();
        }
        assert_eq!(predictor.predict(), Some(counts(1000, 10)), "{}", predictor.chosen().name());
        assert!(Adaptive::new(Vec::new()).is_err());
    }
}
