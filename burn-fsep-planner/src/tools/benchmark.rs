//! Workloads of models on clusters of several sizes, with and without repairs in the step: how well loads balance, and what
//! planning and repairs cost of a layer's time.

use super::{
    least_max_load,
    replay::{ReplayConfig, ReplayStep, Spread, replay_each},
    trace::Trace,
    workload::{Workload, WorkloadError, WorkloadShape},
};
use crate::{
    PlannerError, PlannerStrategy, Topology,
    cost::{CommunicationModel, CostConstants, CostModel},
    repair::RepairConfig,
};

/// A layer's sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BenchmarkSize {
    /// World size `N`.
    pub ranks: usize,
    /// Experts `E`.
    pub experts: usize,
    /// Experts per token `K`.
    pub topk: usize,
    /// Slots a rank `C`.
    pub slots_per_rank: usize,
    /// Hidden size `D`.
    pub hidden_size: usize,
    /// Intermediate size `F` of an expert.
    pub intermediate_size: usize,
}

/// Ranks of a node.
const RANKS_PER_NODE: usize = 8;
/// Tokens of a rank in a step `T`.
const TOKENS_PER_RANK: u32 = 4096;
/// Bytes of a parameter, and of an element of a token.
const ELEMENT_BYTES: f64 = 2.0;

impl BenchmarkSize {
    /// Fine-grained experts of OLMoE's, Qwen3's and DeepSeek-V3's sizes on 8, 64 and 256 ranks, and Mixtral's on each.
    pub const ALL: [Self; 6] = [
        Self { ranks: 8, experts: 64, topk: 4, slots_per_rank: 10, hidden_size: 2048, intermediate_size: 1024 },
        Self { ranks: 64, experts: 128, topk: 4, slots_per_rank: 4, hidden_size: 2048, intermediate_size: 768 },
        Self { ranks: 256, experts: 256, topk: 4, slots_per_rank: 2, hidden_size: 7168, intermediate_size: 2048 },
        Self::mixtral(8),
        Self::mixtral(64),
        Self::mixtral(256),
    ];

    const fn mixtral(ranks: usize) -> Self {
        Self { ranks, experts: 8, topk: 2, slots_per_rank: 2, hidden_size: 4096, intermediate_size: 14336 }
    }

    /// Constants of the paper's cluster, whose compute is of Mixtral's experts, for experts of this size.
    pub fn constants(&self) -> CostConstants {
        let paper = CostConstants::paper_mixtral_8x7b();
        let compute = (self.hidden_size * self.intermediate_size) as f64 / (4096 * 14336) as f64;
        CostConstants {
            seconds_per_assignment: paper.seconds_per_assignment * compute,
            bytes_per_token: self.hidden_size as f64 * ELEMENT_BYTES,
            ..paper
        }
    }

    /// Repairs that have to save more time than their transfers take.
    pub fn priced_repair(&self) -> RepairConfig {
        let bytes_per_expert = (3 * self.hidden_size * self.intermediate_size) as f64 * ELEMENT_BYTES;
        RepairConfig { constants: self.constants(), bytes_per_expert, ..RepairConfig::free() }
    }

    /// The sizes in words.
    pub fn describe(&self) -> String {
        let Self { ranks, experts, topk, slots_per_rank, hidden_size, intermediate_size } = self;
        format!(
            "N={ranks} (nodes of {RANKS_PER_NODE}) E={experts} K={topk} C={slots_per_rank} T={TOKENS_PER_RANK} \
             D={hidden_size} F={intermediate_size}"
        )
    }

    fn topology(&self) -> Result<Topology, PlannerError> {
        Topology::uniform(self.ranks, RANKS_PER_NODE)
    }
}

/// A workload under one way to repair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Largest load of a rank over the mean load.
    pub max_over_mean: Spread,
    /// Share of slots that got another expert in the step.
    pub repaired: Spread,
    /// Seconds to find a layout, beside the step.
    pub layout: Spread,
    /// Seconds to find a repair, in the step.
    pub repair: Spread,
    /// Seconds to find a dispatch, in the step.
    pub dispatch: Spread,
    /// Seconds of the layer in the cost model, without planning and transfers.
    pub layer: Spread,
    /// Seconds that the layer waits for the transfer of changed slots, in the cost model.
    pub transfer: Spread,
}

/// A workload on a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchmarkRow {
    /// The workload.
    pub workload: Workload,
    /// What no layout beats: max/mean.
    pub bound: Spread,
    /// Largest load over the mean of each step with free repairs, and what no layout beats.
    pub steps: Vec<(f64, f64)>,
    /// Static expert parallelism.
    pub fixed: Outcome,
    /// Layouts from past steps alone.
    pub planned: Outcome,
    /// With repairs that cost nothing.
    pub free: Outcome,
    /// With repairs that have to save more than they cost.
    pub priced: Outcome,
}

/// Replays a workload on a layer; its first step does not count.
///
/// # Errors
///
/// [`WorkloadError`] if there are no two steps or the layer makes no such workload.
pub fn run(size: BenchmarkSize, workload: Workload, steps: usize, seed: u64) -> Result<BenchmarkRow, WorkloadError> {
    let topology = size.topology()?;
    let shape = WorkloadShape {
        topology: topology.clone(),
        num_experts: size.experts,
        topk: size.topk,
        tokens_per_rank: TOKENS_PER_RANK,
        seed,
    };
    let trace = workload.trace(&shape, 1, steps)?;
    let outcome = |strategy, repair| outcome(&trace, size, &topology, seed, strategy, repair);
    let (fixed, _) = outcome(PlannerStrategy::Static, None)?;
    let (planned, _) = outcome(PlannerStrategy::MinMax, None)?;
    let (free, imbalances) = outcome(PlannerStrategy::MinMax, Some(RepairConfig::free()))?;
    let (priced, _) = outcome(PlannerStrategy::MinMax, Some(size.priced_repair()))?;
    let mut bounds = Vec::new();
    for (_, counts) in trace.steps(0).skip(1) {
        let mean = counts.total() as f64 / size.ranks as f64;
        bounds.push(least_max_load(counts, size.slots_per_rank)? as f64 / mean.max(f64::MIN_POSITIVE));
    }
    let bound = spread(bounds.iter().copied())?;
    let steps = imbalances.into_iter().zip(bounds).collect();
    Ok(BenchmarkRow { workload, bound, steps, fixed, planned, free, priced })
}

/// What a strategy makes of a trace, and max/mean of each step.
fn outcome(
    trace: &Trace,
    size: BenchmarkSize,
    topology: &Topology,
    seed: u64,
    strategy: PlannerStrategy,
    repair: Option<RepairConfig>,
) -> Result<(Outcome, Vec<f64>), WorkloadError> {
    let config = ReplayConfig { topology: topology.clone(), slots_per_rank: size.slots_per_rank, seed, repair };
    let model = CostModel::new(size.constants(), CommunicationModel::PortMax)?;
    let price = size.priced_repair();
    let mut steps: Vec<(ReplayStep, f64)> = Vec::new();
    replay_each(trace, &config, strategy, |step, plan| {
        if step.step > 0 {
            steps.push((step.clone(), model.layer_seconds(topology, plan)));
        }
    })?;
    let of = |value: &dyn Fn(&ReplayStep) -> f64| spread(steps.iter().map(|(step, _)| value(step)));
    let slots = (size.ranks * size.slots_per_rank) as f64;
    let outcome = Outcome {
        max_over_mean: of(&|step| step.max_over_mean)?,
        repaired: of(&|step| step.repaired_slots.iter().sum::<usize>() as f64 / slots)?,
        layout: of(&|step| step.layout_time.as_secs_f64())?,
        repair: of(&|step| step.repair_time.as_secs_f64())?,
        dispatch: of(&|step| step.dispatch_time.as_secs_f64())?,
        layer: spread(steps.iter().map(|(_, seconds)| *seconds))?,
        transfer: of(&|step| price.transfer_seconds(topology, &step.repaired_slots))?,
    };
    Ok((outcome, steps.iter().map(|(step, _)| step.max_over_mean).collect()))
}

fn spread(values: impl Iterator<Item = f64>) -> Result<Spread, PlannerError> {
    Spread::of(values).ok_or(PlannerError::Zero { what: "number of steps after the first" })
}
