use super::{Predictor, base::check_sizes};
use crate::{PlannerError, RoutingCounts, state};

/// The next step is like an exponential moving average: best where steps scatter around a level that drifts slowly.
#[derive(Debug, Clone)]
pub struct MovingAverage {
    weight: f64,
    /// Shape `[N, E]`.
    mean: Vec<f64>,
    last: Option<RoutingCounts>,
}

impl MovingAverage {
    /// A predictor in which the last step has this weight.
    ///
    /// # Errors
    ///
    /// [`PlannerError::NotFinite`] if `weight` is not in `0 < weight <= 1`.
    pub fn new(weight: f64) -> Result<Self, PlannerError> {
        if !(weight > 0.0 && weight <= 1.0) {
            return Err(PlannerError::NotFinite {
                what: "weight of the last step (above 0, at most 1)".into(),
                value: weight,
            });
        }
        Ok(Self { weight, ..Self::default() })
    }
}

impl Default for MovingAverage {
    fn default() -> Self {
        Self { weight: 0.4, mean: Vec::new(), last: None }
    }
}

impl Predictor for MovingAverage {
    fn name(&self) -> &'static str {
        "moving-average"
    }

    fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
        check_sizes(self.last.as_ref(), counts)?;
        if self.last.is_none() {
            self.mean = counts.as_slice().iter().map(|&n| f64::from(n)).collect();
        } else {
            for (mean, &n) in self.mean.iter_mut().zip(counts.as_slice()) {
                *mean += self.weight * (f64::from(n) - *mean);
            }
        }
        self.last = Some(counts.clone());
        Ok(())
    }

    fn predict(&self) -> Option<RoutingCounts> {
        let last = self.last.as_ref()?;
        // Rounding up may exceed what counts can hold, if they are that large.
        let mean = RoutingCounts::from_loads(last.num_ranks(), last.num_experts(), &self.mean);
        Some(mean.unwrap_or_else(|_| last.clone()))
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        state::put(state, &(&self.mean, &self.last))
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        (self.mean, self.last) = state::take(state)?;
        let loads = self.last.as_ref().map_or(0, |last| last.as_slice().len());
        if self.mean.len() != loads || self.mean.iter().any(|&mean| !(mean.is_finite() && mean >= 0.0)) {
            return Err(PlannerError::State(format!("it has no mean of {loads} loads")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_steps_fade() {
        let counts = |a: u32, b: u32| RoutingCounts::new(1, 2, vec![a, b]).unwrap();
        let mut predictor = MovingAverage::new(0.5).unwrap();
        assert_eq!(predictor.predict(), None);
        for step in [counts(80, 0), counts(0, 0), counts(40, 16)] {
            predictor.observe(&step).unwrap();
        }
        assert_eq!(predictor.predict(), Some(counts(40, 8)));
        for weight in [0.0, -1.0, 1.1, f64::NAN] {
            assert!(MovingAverage::new(weight).is_err(), "{weight}");
        }
    }
}
