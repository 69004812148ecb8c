use super::{LayerLoad, Simulator, SimulatorError, StepTime};
use crate::{
    PlannerStrategy,
    tools::replay::{ReplayConfig, replay_each},
    tools::trace::Trace,
};

/// How to run a trace through the simulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceRun {
    /// Steps at the start that do not count: the first has no history to plan from.
    pub skip_steps: usize,
    /// Seed of the strategies' random choices.
    pub seed: u64,
}

/// What a strategy makes of a trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Mean step.
    pub time: StepTime,
    /// Largest load of a rank over the mean load, mean over layers and steps.
    pub max_over_mean: f64,
}

impl Simulator {
    /// Replays a trace under a strategy and simulates each of its steps. The trace may be of another number of tokens:
    /// only shares count. Traced layers stand for the model's layers in turn.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Planner`] if the trace does not fit the cluster or the model, [`SimulatorError::Empty`] if no
    /// step is left, [`SimulatorError::Setting`] if layouts would have to change that cannot: those of owned experts.
    pub fn run_trace(
        &self,
        trace: &Trace,
        run: TraceRun,
        strategy: PlannerStrategy,
    ) -> Result<Outcome, SimulatorError> {
        self.check_strategy(strategy)?;
        for (what, expected, actual) in [
            ("ranks of the trace", self.cluster.world_size(), trace.num_ranks()),
            ("experts of the trace", self.model.experts, trace.num_experts()),
        ] {
            if expected != actual {
                return Err(crate::PlannerError::Shape { what: what.into(), expected, actual }.into());
            }
        }
        let topology = self.cluster.topology()?;
        let config = ReplayConfig {
            topology: topology.clone(),
            slots_per_rank: self.model.slots(self.cluster.world_size()),
            seed: run.seed,
            repair: None,
        };
        // By step, then by layer.
        let mut loads: Vec<Vec<LayerLoad>> = Vec::new();
        replay_each(trace, &config, strategy, |at, plan| {
            if let Some(step) = at.step.checked_sub(run.skip_steps) {
                if loads.len() <= step {
                    loads.resize_with(step + 1, Vec::new);
                }
                loads[step].push(LayerLoad::of_plan(&topology, plan));
            }
        })?;
        let times: Vec<StepTime> = loads.iter().map(|layers| self.step(layers)).collect();
        let time = StepTime::mean(&times).ok_or_else(|| {
            SimulatorError::Empty(format!("no layer of the trace has more than {} step(s)", run.skip_steps))
        })?;
        let imbalances: Vec<f64> = loads.iter().flatten().map(|load| load.max_over_mean).collect();
        Ok(Outcome { time, max_over_mean: imbalances.iter().sum::<f64>() / imbalances.len() as f64 })
    }

    /// The strategies that the model's weights allow.
    pub fn strategies(&self) -> Vec<PlannerStrategy> {
        PlannerStrategy::ALL.into_iter().filter(|&strategy| self.check_strategy(strategy).is_ok()).collect()
    }

    fn check_strategy(&self, strategy: PlannerStrategy) -> Result<(), SimulatorError> {
        if self.model.weights == super::WeightPlacement::Owned && strategy != PlannerStrategy::Static {
            let expected = format!("\"sharded\" for the strategy {strategy}: owned experts do not move");
            return Err(SimulatorError::setting("weights", "\"owned\"", expected));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::{
        ModelSpec, SyntheticRouting, WeightPlacement,
        model::tests::{small_cluster, small_model},
    };

    const RUN: TraceRun = TraceRun { skip_steps: 1, seed: 0 };

    #[test]
    fn better_plans_make_shorter_steps() {
        let simulator = Simulator::new(small_cluster(), small_model()).unwrap();
        let trace = SyntheticRouting { sigma: 0.8, steps: 8, seed: 3 }.trace(&small_cluster(), &small_model()).unwrap();
        // The first steps jump.
        let settled = TraceRun { skip_steps: 3, seed: 0 };
        let [fixed, paper, ours] = [PlannerStrategy::Static, PlannerStrategy::Paper, PlannerStrategy::MinMax]
            .map(|strategy| simulator.run_trace(&trace, settled, strategy).unwrap());
        assert!(ours.max_over_mean - 1.0 < (fixed.max_over_mean - 1.0) / 2.0, "{fixed:?} {ours:?}");
        assert!(ours.time.total() < paper.time.total() && paper.time.total() < fixed.time.total());
        assert!(ours.time.total() >= simulator.step(&[]).total(), "balance without transport is a bound");
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let simulator = Simulator::new(small_cluster(), small_model()).unwrap();
        let routing = SyntheticRouting { sigma: 0.5, steps: 2, seed: 0 };
        let trace = routing.trace(&small_cluster(), &small_model()).unwrap();
        let late = TraceRun { skip_steps: 2, seed: 0 };
        assert!(matches!(simulator.run_trace(&trace, late, PlannerStrategy::Static), Err(SimulatorError::Empty(_))));
        let other = routing.trace(&small_cluster(), &ModelSpec { experts: 4, ..small_model() }).unwrap();
        assert!(matches!(simulator.run_trace(&other, RUN, PlannerStrategy::Static), Err(SimulatorError::Planner(_))));
        let owned = ModelSpec { weights: WeightPlacement::Owned, ..small_model() };
        let owned = Simulator::new(small_cluster(), owned).unwrap();
        assert_eq!(owned.strategies(), [PlannerStrategy::Static]);
        assert_eq!(owned.run_trace(&trace, RUN, PlannerStrategy::MinMax).unwrap_err().field(), Some("weights"));
    }
}
