//! Calibration: constants of a cluster from measured steps.

use super::{ClusterSpec, ModelSpec, Simulator, SimulatorError, StepTime};

/// A measured step.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// The model and its batch.
    pub model: ModelSpec,
    /// Largest load of a rank over the mean load.
    pub max_over_mean: f64,
    /// Seconds of the step.
    pub seconds: f64,
}

impl Observation {
    /// The simulated step on a cluster.
    ///
    /// # Errors
    ///
    /// As [`Simulator::new`] and [`Simulator::step_of_imbalance`].
    pub fn predict(&self, cluster: &ClusterSpec) -> Result<StepTime, SimulatorError> {
        Simulator::new(cluster.clone(), self.model.clone())?.step_of_imbalance(self.max_over_mean)
    }

    /// Predicted over measured, minus 1.
    ///
    /// # Errors
    ///
    /// As [`Observation::predict`].
    pub fn relative_error(&self, cluster: &ClusterSpec) -> Result<f64, SimulatorError> {
        Ok(self.predict(cluster)?.total() / self.seconds - 1.0)
    }
}

/// Fits the two constants that no datasheet has, [`ClusterSpec::straggler_factor`] and
/// [`ClusterSpec::layer_overhead_seconds`], to measured steps: least squares of the relative errors. All others stay.
///
/// # Errors
///
/// [`SimulatorError::Empty`] with fewer than two observations, [`SimulatorError::Setting`] for a time that is not
/// positive; otherwise as [`Observation::predict`].
pub fn fit(cluster: &ClusterSpec, observations: &[Observation]) -> Result<ClusterSpec, SimulatorError> {
    if observations.len() < 2 {
        return Err(SimulatorError::Empty("two constants need at least two measured steps to fit".into()));
    }
    for observation in observations {
        super::cluster::positive("seconds", observation.seconds)?;
        observation.predict(cluster)?;
    }
    let with = |point: &[f64; 2]| ClusterSpec {
        straggler_factor: point[0].abs(),
        layer_overhead_seconds: point[1].abs(),
        ..cluster.clone()
    };
    let loss = |point: &[f64; 2]| -> f64 {
        let cluster = with(point);
        // A point without a prediction (not finite) is as bad as can be.
        observations.iter().map(|o| o.relative_error(&cluster).map_or(f64::INFINITY, |error| error * error)).sum()
    };
    Ok(with(&nelder_mead(loss, [1.5, 0.01], [0.5, 0.005], 500)))
}

/// Minimises a function by the simplex method of Nelder and Mead (1965).
fn nelder_mead<const D: usize>(
    f: impl Fn(&[f64; D]) -> f64,
    start: [f64; D],
    scale: [f64; D],
    iterations: usize,
) -> [f64; D] {
    let mut simplex = vec![(f(&start), start)];
    for axis in 0..D {
        let mut point = start;
        point[axis] += scale[axis];
        simplex.push((f(&point), point));
    }
    for _ in 0..iterations {
        simplex.sort_by(|a, b| a.0.total_cmp(&b.0));
        let worst = simplex[D];
        let mut centre = [0.0; D];
        for (_, point) in &simplex[..D] {
            (0..D).for_each(|i| centre[i] += point[i] / D as f64);
        }
        let at = |step: f64| {
            let point: [f64; D] = std::array::from_fn(|i| centre[i] + step * (worst.1[i] - centre[i]));
            (f(&point), point)
        };
        let reflected = at(-1.0);
        simplex[D] = if reflected.0 < simplex[0].0 {
            let expanded = at(-2.0);
            if expanded.0 < reflected.0 { expanded } else { reflected }
        } else if reflected.0 < simplex[D - 1].0 {
            reflected
        } else {
            at(if reflected.0 < worst.0 { -0.5 } else { 0.5 })
        };
        if simplex[D].0 >= worst.0 {
            let best = simplex[0].1;
            for (value, point) in &mut simplex[1..] {
                (0..D).for_each(|i| point[i] = (point[i] + best[i]) / 2.0);
                *value = f(point);
            }
        }
    }
    simplex.sort_by(|a, b| a.0.total_cmp(&b.0));
    simplex[0].1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulator::model::tests::{small_cluster, small_model};

    #[test]
    fn the_minimum_of_a_valley_is_found() {
        let rosenbrock = |p: &[f64; 2]| (1.0 - p[0]).powi(2) + 100.0 * (p[1] - p[0] * p[0]).powi(2);
        let [x, y] = nelder_mead(rosenbrock, [-1.2, 1.0], [0.5, 0.5], 500);
        assert!((x - 1.0).abs() < 1e-6 && (y - 1.0).abs() < 1e-6, "{x} {y}");
    }

    #[test]
    fn known_constants_are_found_again() {
        let truth = ClusterSpec { straggler_factor: 2.2, layer_overhead_seconds: 0.004, ..small_cluster() };
        let observations: Vec<Observation> = [(1, 1.1), (2, 1.7), (4, 1.3), (8, 2.0)]
            .into_iter()
            .map(|(micro_batches, max_over_mean)| {
                let model = ModelSpec { micro_batches, ..small_model() };
                let mut observation = Observation { model, max_over_mean, seconds: 1.0 };
                observation.seconds = observation.predict(&truth).unwrap().total();
                observation
            })
            .collect();
        let fitted = fit(&small_cluster(), &observations).unwrap();
        assert!((fitted.straggler_factor - 2.2).abs() < 1e-4, "{fitted:?}");
        assert!((fitted.layer_overhead_seconds - 0.004).abs() < 1e-6, "{fitted:?}");
        assert!(matches!(fit(&small_cluster(), &observations[..1]), Err(SimulatorError::Empty(_))));
        let bad = Observation { seconds: 0.0, ..observations[0].clone() };
        assert_eq!(fit(&small_cluster(), &[bad, observations[1].clone()]).unwrap_err().field(), Some("seconds"));
    }
}
