//! Replay: what a strategy would have made of a traced run.

use std::time::{Duration, Instant};

use crate::{
    LayerPlanner, Layout, PlannerError, PlannerStrategy, Topology,
    dispatch::DispatchPlan,
    repair::{LayoutRepair, RepairConfig},
    tools::trace::Trace,
};

/// How to replay a trace.
#[derive(Debug, Clone)]
pub struct ReplayConfig {
    /// The ranks and their nodes.
    pub topology: Topology,
    /// Slots a rank `C`.
    pub slots_per_rank: usize,
    /// Seed of the strategy's random choices.
    pub seed: u64,
    /// Repairs layouts in the step, once its counts are known.
    pub repair: Option<RepairConfig>,
}

/// One layer in one step under a strategy.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplayStep {
    /// The layer.
    pub layer: usize,
    /// How many steps of the layer came before.
    pub step: usize,
    /// Largest load of a rank over the mean load.
    pub max_over_mean: f64,
    /// Assignments that each rank computes. Shape `[N]`.
    pub loads: Vec<u64>,
    /// Share of assignments computed on another node than their token's.
    pub cross_node_share: f64,
    /// Experts that a rank holds and did not hold in the step before.
    pub moved_slots: usize,
    /// Experts that the repair gave to each rank in the step itself. Shape `[N]`.
    pub repaired_slots: Vec<usize>,
    /// How long the layout for this step took to find.
    pub layout_time: Duration,
    /// How long the repair took to find, or that there is nothing to repair.
    pub repair_time: Duration,
    /// How long the dispatch took to find.
    pub dispatch_time: Duration,
}

/// Replays every layer of a trace: each step's layout comes from the steps before, its dispatch from its own counts.
/// The first step of a layer runs on the static layout.
///
/// # Errors
///
/// [`PlannerError`] if the trace does not fit the topology or the slots cannot hold its experts.
pub fn replay(
    trace: &Trace,
    config: &ReplayConfig,
    strategy: PlannerStrategy,
) -> Result<Vec<ReplayStep>, PlannerError> {
    let mut steps = Vec::new();
    replay_each(trace, config, strategy, |step, _| steps.push(step.clone()))?;
    Ok(steps)
}

/// As [`replay`], handing each step with its dispatch plan to `visit`, layer by layer.
///
/// # Errors
///
/// As [`replay`].
pub fn replay_each(
    trace: &Trace,
    config: &ReplayConfig,
    strategy: PlannerStrategy,
    mut visit: impl FnMut(&ReplayStep, &DispatchPlan),
) -> Result<(), PlannerError> {
    let ReplayConfig { topology, slots_per_rank, seed, repair } = config;
    let mut repair = repair.map(LayoutRepair::new).transpose()?;
    let initial = Layout::static_ep(topology.world_size(), *slots_per_rank, trace.num_experts())?;
    let mut dispatcher = strategy.dispatcher();
    let mut plan = DispatchPlan::new();
    for layer in trace.layers() {
        let solver = strategy.solver(seed.wrapping_add(layer as u64));
        let mut planner = LayerPlanner::new(topology.clone(), initial.clone(), strategy.predictor(), solver);
        let mut layout = initial.clone();
        let (mut moved_slots, mut layout_time) = (0, Duration::ZERO);
        for (step, (_, counts)) in trace.steps(layer).enumerate() {
            let start = Instant::now();
            let mut repaired_slots = vec![0; topology.world_size()];
            if let Some(repair) = &mut repair
                && let Some(repaired) = repair.repair(topology, &layout, counts)?
            {
                repaired_slots = repaired.received_slots(&layout);
                layout = repaired;
            }
            let repair_time = start.elapsed();
            let start = Instant::now();
            dispatcher.dispatch(topology, &layout, counts, &mut plan)?;
            let dispatch_time = start.elapsed();
            let replayed = ReplayStep {
                layer,
                step,
                max_over_mean: plan.max_over_mean(),
                loads: plan.loads(),
                cross_node_share: plan.cross_node_tokens(topology) as f64 / counts.total().max(1) as f64,
                moved_slots,
                repaired_slots,
                layout_time,
                repair_time,
                dispatch_time,
            };
            visit(&replayed, &plan);
            let start = Instant::now();
            let next = planner.plan(counts)?.clone();
            layout_time = start.elapsed();
            moved_slots = next.moved_slots(&layout);
            layout = next;
        }
    }
    Ok(())
}

/// Mean, percentiles and maximum of some numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile (nearest rank).
    pub p95: f64,
    /// 99th percentile (nearest rank).
    pub p99: f64,
    /// Largest value.
    pub max: f64,
}

impl Spread {
    /// The spread of `values`; `None` if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        let at = |q: f64| values[((values.len() as f64 * q).ceil() as usize).clamp(1, values.len()) - 1];
        Some(Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
            max,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::RoutingCounts;

    fn config(ranks: usize) -> ReplayConfig {
        ReplayConfig { topology: Topology::single_node(ranks).unwrap(), slots_per_rank: 2, seed: 0, repair: None }
    }

    #[test]
    fn planning_helps_from_the_second_step_on() {
        let counts = RoutingCounts::from_rows(&vec![vec![90, 30, 20, 10]; 4]).unwrap();
        let trace = Trace::new((0..3).map(|step| ((0, step), counts.clone())).collect::<BTreeMap<_, _>>()).unwrap();
        let fixed = replay(&trace, &config(4), PlannerStrategy::Static).unwrap();
        let ours = replay(&trace, &config(4), PlannerStrategy::MinMax).unwrap();
        assert!(fixed[2].max_over_mean > 1.3);
        assert!(ours[1].max_over_mean < 1.01 && ours[2].max_over_mean < 1.01, "{ours:?}");
        assert_eq!(ours[2].moved_slots, 0, "a good layout is kept");
    }

    #[test]
    fn spread_of_known_numbers() {
        let spread = Spread::of((1..=100).map(f64::from)).unwrap();
        assert_eq!(spread, Spread { mean: 50.5, p50: 50.0, p95: 95.0, p99: 99.0, max: 100.0 });
        assert_eq!(Spread::of([]), None);
    }
}
