use super::{LayerLoad, Simulator, SimulatorError, StepTime};
use crate::{
    PlannerError, PlannerStrategy, RoutingCounts,
    cost::CostConstants,
    repair::RepairConfig,
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
    /// Layouts are repaired in the step itself, once its counts are known, where that is faster; what the repair brings travels
    /// behind nothing.
    pub repair: bool,
}

/// What a strategy makes of a trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Mean step: forward each layer as long as its slowest group takes, backward as long as the slowest group's sum. What a group
    /// waits for others in forward is part of [`StepTime::waiting`].
    pub time: StepTime,
    /// Largest load of a rank over the mean load of its group, mean over layers, steps and groups.
    pub max_over_mean: f64,
    /// The same of the groups that were slowest in backward.
    pub slowest_max_over_mean: f64,
}

/// A group's step.
#[derive(Debug, Clone)]
struct GroupStep {
    time: StepTime,
    /// Of these, forward by traced layer, for all of the model's layers that it stands for.
    forward: Vec<f64>,
    max_over_mean: f64,
}

impl GroupStep {
    /// All that groups do between two forward passes.
    fn backward(&self) -> f64 {
        self.time.total() - self.forward.iter().sum::<f64>()
    }
}

/// A step of all groups.
struct SlowestGroup {
    /// The one that is slowest in backward.
    step: GroupStep,
    /// The slowest in forward, layer by layer.
    forward: Vec<f64>,
}

impl SlowestGroup {
    fn new(step: GroupStep) -> Self {
        Self { forward: step.forward.clone(), step }
    }

    fn add(&mut self, other: GroupStep) {
        self.forward.iter_mut().zip(&other.forward).for_each(|(slowest, &seconds)| *slowest = slowest.max(seconds));
        if other.backward() > self.step.backward() {
            self.step = other;
        }
    }

    fn time(&self) -> StepTime {
        let forward: f64 = self.forward.iter().zip(&self.step.forward).map(|(slowest, own)| slowest - own).sum();
        StepTime { waiting: self.step.time.waiting + forward, ..self.step.time }
    }
}

impl Simulator {
    /// Replays a trace under a strategy and simulates each of its steps, each group for itself: a planner sees its group's load. Groups
    /// meet in each layer's forward pass, where all wait for all groups' expert loads, and at the end of backward, where gradients are
    /// averaged. The trace may be of another number of tokens: only shares
    /// count. Traced layers stand for the model's layers in turn.
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
        let (world, ranks) = (self.cluster.world_size(), self.groups.ranks);
        self.check_shape("ranks of the trace", world, trace.num_ranks())?;
        if ranks == world {
            return self.run_groups([Ok(trace.clone())], run, strategy);
        }
        self.run_groups((0..world / ranks).map(|group| part_of(trace, group * ranks, ranks)), run, strategy)
    }

    /// As [`Simulator::run_trace`] with the traces of groups one by one; not all of the cluster's groups need be there.
    ///
    /// # Errors
    ///
    /// As there, and those of the traces.
    pub fn run_groups(
        &self,
        traces: impl IntoIterator<Item = Result<Trace, SimulatorError>>,
        run: TraceRun,
        strategy: PlannerStrategy,
    ) -> Result<Outcome, SimulatorError> {
        self.check_strategy(strategy)?;
        // The slowest group of each step, and the sum of all groups' imbalances.
        let mut slowest: Vec<SlowestGroup> = Vec::new();
        let (mut sum, mut count) = (0.0, 0.0);
        for trace in traces {
            for (step, of_group) in self.group_steps(&trace?, run, strategy)?.into_iter().enumerate() {
                (sum, count) = (sum + of_group.max_over_mean, count + 1.0);
                match slowest.get_mut(step) {
                    None => slowest.push(SlowestGroup::new(of_group)),
                    Some(slow) => slow.add(of_group),
                }
            }
        }
        let times: Vec<StepTime> = slowest.iter().map(SlowestGroup::time).collect();
        let time = StepTime::mean(&times).ok_or_else(|| {
            SimulatorError::Empty(format!("no layer of the trace has more than {} step(s)", run.skip_steps))
        })?;
        let slowest_max_over_mean =
            slowest.iter().map(|slow| slow.step.max_over_mean).sum::<f64>() / slowest.len() as f64;
        Ok(Outcome { time, max_over_mean: sum / count, slowest_max_over_mean })
    }

    fn check_shape(&self, what: &str, expected: usize, actual: usize) -> Result<(), SimulatorError> {
        if expected == actual {
            return Ok(());
        }
        Err(PlannerError::Shape { what: what.into(), expected, actual }.into())
    }

    fn group_steps(
        &self,
        trace: &Trace,
        run: TraceRun,
        strategy: PlannerStrategy,
    ) -> Result<Vec<GroupStep>, SimulatorError> {
        self.check_shape("ranks of the trace", self.groups.ranks, trace.num_ranks())?;
        self.check_shape("experts of the trace", self.model.experts, trace.num_experts())?;
        let topology = self.groups.cluster(&self.cluster).topology()?;
        let repair = run.repair.then(|| self.repair());
        let config = ReplayConfig {
            topology: topology.clone(),
            slots_per_rank: self.model.slots(self.groups.ranks),
            seed: run.seed,
            repair,
        };
        // By step, then by layer.
        let mut loads: Vec<(Vec<LayerLoad>, Vec<f64>)> = Vec::new();
        replay_each(trace, &config, strategy, |at, plan| {
            if let Some(step) = at.step.checked_sub(run.skip_steps) {
                if loads.len() <= step {
                    loads.resize_with(step + 1, Default::default);
                }
                let (layers, repairs) = &mut loads[step];
                layers.push(LayerLoad::of_plan(&topology, plan));
                repairs.push(repair.map_or(0.0, |repair| repair.transfer_seconds(&topology, &at.repaired_slots)));
            }
        })?;
        let micro_batches = self.model.micro_batches as f64;
        let of_step = |(loads, repairs): &(Vec<LayerLoad>, Vec<f64>)| {
            let traced = loads.len() as f64;
            let layers = self.model.moe_layers() as f64 / traced;
            let mut time = self.step(loads);
            time.exposed_restore += repairs.iter().sum::<f64>() * layers * micro_batches;
            let forward = loads
                .iter()
                .zip(repairs)
                .map(|(load, repair)| layers * (self.forward_seconds(load) + repair * micro_batches))
                .collect();
            GroupStep {
                time,
                forward,
                max_over_mean: loads.iter().map(|load| load.max_over_mean).sum::<f64>() / traced,
            }
        };
        Ok(loads.iter().map(of_step).collect())
    }

    /// What a repair costs and saves.
    fn repair(&self) -> RepairConfig {
        let (cluster, model) = (&self.cluster, &self.model);
        let constants = CostConstants {
            seconds_per_assignment: model.expert_flops() / cluster.constants.matmul_flops_per_second(),
            bytes_per_token: model.token_bytes(),
            inter_node_bytes_per_second: cluster.node_bytes_per_second() / cluster.ranks_per_node as f64,
            ..cluster.constants.cost_constants()
        };
        let bytes_per_expert = model.expert_parameters() * model.element_bytes as f64;
        RepairConfig { constants, bytes_per_expert, tolerance: RepairConfig::free().tolerance }
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

/// The rows of some neighbouring ranks.
fn part_of(trace: &Trace, first: usize, ranks: usize) -> Result<Trace, SimulatorError> {
    let mut counts = std::collections::BTreeMap::new();
    for layer in trace.layers() {
        for (step, all) in trace.steps(layer) {
            let rows: Vec<Vec<u32>> = (first..first + ranks).map(|rank| all.row(rank).to_vec()).collect();
            counts.insert((layer, step), RoutingCounts::from_rows(&rows)?);
        }
    }
    Ok(Trace::new(counts)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::{
        GroupSpec, ModelSpec, SyntheticRouting, WeightPlacement,
        model::tests::{small_cluster, small_model},
    };

    const RUN: TraceRun = TraceRun { skip_steps: 1, seed: 0, repair: false };

    #[test]
    fn better_plans_make_shorter_steps() {
        let simulator = Simulator::new(small_cluster(), small_model()).unwrap();
        let trace = SyntheticRouting { sigma: 0.8, steps: 8, seed: 3 }.trace(&small_cluster(), &small_model()).unwrap();
        // The first steps jump.
        let settled = TraceRun { skip_steps: 3, ..RUN };
        let [fixed, paper, ours] = [PlannerStrategy::Static, PlannerStrategy::Paper, PlannerStrategy::MinMax]
            .map(|strategy| simulator.run_trace(&trace, settled, strategy).unwrap());
        assert!(ours.max_over_mean - 1.0 < (fixed.max_over_mean - 1.0) / 2.0, "{fixed:?} {ours:?}");
        assert!(ours.time.total() < paper.time.total() && paper.time.total() < fixed.time.total());
        assert!(ours.time.total() >= simulator.step(&[]).total(), "balance without transport is a bound");
    }

    #[test]
    fn a_step_is_as_long_as_that_of_the_slowest_group() {
        let model = ModelSpec { slots_per_rank: 0, ..small_model() };
        let trace = SyntheticRouting { sigma: 0.8, steps: 6, seed: 3 }.trace(&small_cluster(), &model).unwrap();
        let outcome = |ranks, strategy| {
            let groups = GroupSpec { ranks, zero: false };
            let simulator = Simulator::new(small_cluster(), model.clone()).unwrap().with_groups(groups).unwrap();
            simulator.run_trace(&trace, RUN, strategy).unwrap()
        };
        let (one, two) = (outcome(8, PlannerStrategy::Static), outcome(4, PlannerStrategy::Static));
        assert_eq!(one.max_over_mean, one.slowest_max_over_mean);
        assert!(two.slowest_max_over_mean >= two.max_over_mean);
        assert!(two.slowest_max_over_mean > two.max_over_mean || two.max_over_mean == 1.0, "two groups differ");
        let alone = outcome(1, PlannerStrategy::MinMax);
        assert_eq!((alone.max_over_mean, alone.time.all_to_all), (1.0, 0.0));
    }

    #[test]
    fn groups_meet_in_each_layers_forward_pass() {
        let step = |waiting, forward: [f64; 2]| GroupStep {
            time: StepTime { waiting, ..StepTime::default() },
            forward: forward.to_vec(),
            max_over_mean: 1.0,
        };
        let mut slowest = SlowestGroup::new(step(10.0, [1.0, 3.0]));
        slowest.add(step(9.0, [3.0, 1.0]));
        // Forward 3 and 3, where each group alone has 4; backward 6.
        assert_eq!(slowest.time().total(), 12.0);
        slowest.add(step(10.0, [1.0, 2.0]));
        assert_eq!(slowest.time().total(), 13.0);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let simulator = Simulator::new(small_cluster(), small_model()).unwrap();
        let routing = SyntheticRouting { sigma: 0.5, steps: 2, seed: 0 };
        let trace = routing.trace(&small_cluster(), &small_model()).unwrap();
        let late = TraceRun { skip_steps: 2, ..RUN };
        assert!(matches!(simulator.run_trace(&trace, late, PlannerStrategy::Static), Err(SimulatorError::Empty(_))));
        let other = routing.trace(&small_cluster(), &ModelSpec { experts: 4, ..small_model() }).unwrap();
        assert!(matches!(simulator.run_trace(&other, RUN, PlannerStrategy::Static), Err(SimulatorError::Planner(_))));
        let owned = ModelSpec { weights: WeightPlacement::Owned, ..small_model() };
        let owned = Simulator::new(small_cluster(), owned).unwrap();
        assert_eq!(owned.strategies(), [PlannerStrategy::Static]);
        assert_eq!(owned.run_trace(&trace, RUN, PlannerStrategy::MinMax).unwrap_err().field(), Some("weights"));
    }
}
