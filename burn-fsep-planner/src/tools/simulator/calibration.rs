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
    /// Share of the step that a profiler saw in token All-to-Alls, waiting included (mean over ranks), where there was
    /// one: it tells waiting from work, which step times alone hardly do.
    pub communication_share: Option<f64>,
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

/// Fits the three constants that no datasheet has, [`ClusterSpec::straggler_factor`],
/// [`ClusterSpec::elementwise_passes`] and [`ClusterSpec::layer_overhead_seconds`], to measured steps: least squares of the
/// relative errors of times and of the differences of communication shares. All others stay.
///
/// # Errors
///
/// [`SimulatorError::Empty`] with fewer than three observations, [`SimulatorError::Setting`] for a time that is not
/// positive; otherwise as [`Observation::predict`].
pub fn fit(cluster: &ClusterSpec, observations: &[Observation]) -> Result<ClusterSpec, SimulatorError> {
    if observations.len() < 3 {
        return Err(SimulatorError::Empty("three constants need at least three measured steps to fit".into()));
    }
    for observation in observations {
        super::cluster::positive("seconds", observation.seconds)?;
        observation.predict(cluster)?;
    }
    // In units that make all three numbers similar; none can be negative.
    let with = |point: &[f64; 3]| ClusterSpec {
        straggler_factor: point[0].abs(),
        elementwise_passes: point[1].abs() * 10.0,
        layer_overhead_seconds: point[2].abs() * 1e-2,
        ..cluster.clone()
    };
    let loss = |point: &[f64; 3]| -> f64 {
        let cluster = with(point);
        let loss = |observation: &Observation| {
            // A point without a prediction (not finite) is as bad as can be.
            let Ok(time) = observation.predict(&cluster) else { return f64::INFINITY };
            let share = observation.communication_share.map_or(0.0, |share| time.communication_share() - share);
            (time.total() / observation.seconds - 1.0).powi(2) + share.powi(2)
        };
        observations.iter().map(loss).sum()
    };
    Ok(with(&nelder_mead(loss, [1.5, 1.0, 1.0], [0.5, 0.5, 0.5], 1000)))
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
    use crate::tools::simulator::model::tests::{small_cluster, small_model};

    #[test]
    fn the_minimum_of_a_valley_is_found() {
        let rosenbrock = |p: &[f64; 2]| (1.0 - p[0]).powi(2) + 100.0 * (p[1] - p[0] * p[0]).powi(2);
        let [x, y] = nelder_mead(rosenbrock, [-1.2, 1.0], [0.5, 0.5], 500);
        assert!((x - 1.0).abs() < 1e-6 && (y - 1.0).abs() < 1e-6, "{x} {y}");
    }

    #[test]
    fn known_constants_are_found_again() {
        let truth = ClusterSpec {
            straggler_factor: 1.3,
            elementwise_passes: 20.0,
            layer_overhead_seconds: 0.004,
            ..small_cluster()
        };
        let observations: Vec<Observation> = [(1, 1.1), (2, 1.7), (4, 1.3), (8, 2.0)]
            .into_iter()
            .map(|(micro_batches, max_over_mean)| {
                let model = ModelSpec { micro_batches, ..small_model() };
                let observation = Observation { model, max_over_mean, seconds: 1.0, communication_share: None };
                let time = observation.predict(&truth).unwrap();
                let communication_share = Some(time.communication_share());
                Observation { seconds: time.total(), communication_share, ..observation }
            })
            .collect();
        let fitted = fit(&small_cluster(), &observations).unwrap();
        assert!((fitted.straggler_factor - 1.3).abs() < 1e-3, "{fitted:?}");
        assert!((fitted.elementwise_passes - 20.0).abs() < 1e-2, "{fitted:?}");
        assert!((fitted.layer_overhead_seconds - 0.004).abs() < 1e-5, "{fitted:?}");
        assert!(matches!(fit(&small_cluster(), &observations[..2]), Err(SimulatorError::Empty(_))));
        let mut bad = observations.clone();
        bad[0].seconds = 0.0;
        assert_eq!(fit(&small_cluster(), &bad).unwrap_err().field(), Some("seconds"));
    }
}
