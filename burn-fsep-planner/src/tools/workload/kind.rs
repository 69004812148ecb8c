use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    WorkloadShape,
    draws::{Draws, Purpose},
    rows, shares,
};
use crate::{PlannerError, RoutingCounts, tools::trace::Trace};

/// A pattern of routing, by name.
///
/// The first eight have the names of the token imbalance benchmark proposed for Megatron-LM (PR 7488). There, as here, an
/// eighth of the experts is hot and takes half of all assignments.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// W0: every expert gets the same from every rank, exactly.
    Balanced,
    /// W1: hot experts anywhere.
    HotExpertSet,
    /// W2: hot experts that are neighbours, which static expert parallelism puts on the same ranks.
    HotRank,
    /// W3: hot experts at equal distances.
    SpreadHotExperts,
    /// W4: no hot experts, but ranks of 0.1 to 1.9 times the mean number of tokens, drawn anew in each step.
    SourceRagged,
    /// W5: a quarter of the experts, neighbours, gets no token at all.
    ZeroExpertRank,
    /// W6: other hot experts in each step: the worst for layouts made from past steps.
    RotatingHotspot,
    /// W7: in one step of eight an eighth of the experts is hot, each time another; in between none is.
    Burst,
    /// `percent` of the assignments go to `experts` experts alike, the others get the rest alike. As LLEP (arXiv 2601.17111)
    /// tests: 30:4, 50:4, 80:4, 95:4.
    HotShare {
        /// Share of the assignments, in percent.
        percent: u8,
        /// Number of hot experts.
        experts: usize,
    },
    /// Zipf loads, in an order and of a power that give static expert parallelism this max/mean, as UltraEP (arXiv
    /// 2606.04101) tests.
    ZipfImbalance(f64),
    /// Zipf loads of this power, in random order.
    ZipfPower(f64),
    /// Log-normal loads of this sigma that drift as in training: log-shares have correlation 0.9 with those of the step
    /// before and 0.77 with those five steps before, nodes differ by 9 %, and after two steps 40 % of the counts move.
    LogNormal(f64),
    /// Log-normal loads (sigma 0.8) drawn anew every ten steps.
    SuddenShift,
    /// Log-normal loads (sigma 0.8) that turn into others over twenty steps.
    SlowDrift,
    /// Loads that swing with a period of eight steps, each expert in its own phase (sigma 0.8).
    Periodic,
    /// Log-normal loads of sigma 0.02.
    NearUniform,
}

/// A workload that cannot be generated.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum WorkloadError {
    /// Sizes that make no workload.
    #[error(transparent)]
    Shape(#[from] PlannerError),
    /// What a workload promises is not possible with this shape.
    #[error("workload {workload} is not possible here: {problem}")]
    Impossible {
        /// The workload.
        workload: Workload,
        /// Why, and what would be possible.
        problem: String,
    },
}

impl Workload {
    /// W0 to W7.
    pub const BENCHMARK: [Workload; 8] = [
        Workload::Balanced,
        Workload::HotExpertSet,
        Workload::HotRank,
        Workload::SpreadHotExperts,
        Workload::SourceRagged,
        Workload::ZeroExpertRank,
        Workload::RotatingHotspot,
        Workload::Burst,
    ];

    /// Few experts with most of the load: 30:4, 50:4, 80:4, 95:4.
    pub const FEW_HOT: [Workload; 4] = [
        Workload::HotShare { percent: 30, experts: 4 },
        Workload::HotShare { percent: 50, experts: 4 },
        Workload::HotShare { percent: 80, experts: 4 },
        Workload::HotShare { percent: 95, experts: 4 },
    ];

    /// Loads that change, or hardly, for any shape.
    pub const DRIFT: [Workload; 6] = [
        Workload::LogNormal(0.45),
        Workload::LogNormal(1.5),
        Workload::SuddenShift,
        Workload::SlowDrift,
        Workload::Periodic,
        Workload::NearUniform,
    ];

    /// The name that [`Workload::from_str`] understands.
    pub fn name(self) -> String {
        let fixed = match self {
            Workload::Balanced => "w0-balanced",
            Workload::HotExpertSet => "w1-hot-expert-set",
            Workload::HotRank => "w2-hot-rank",
            Workload::SpreadHotExperts => "w3-spread-hot-experts",
            Workload::SourceRagged => "w4-source-ragged",
            Workload::ZeroExpertRank => "w5-zero-expert-rank",
            Workload::RotatingHotspot => "w6-rotating-hotspot",
            Workload::Burst => "w7-burst",
            Workload::SuddenShift => "sudden-shift",
            Workload::SlowDrift => "slow-drift",
            Workload::Periodic => "periodic",
            Workload::NearUniform => "near-uniform",
            Workload::HotShare { percent, experts } => return format!("{percent}:{experts}"),
            Workload::ZipfImbalance(imbalance) => return format!("zipf:{imbalance}"),
            Workload::ZipfPower(power) => return format!("zipf-power:{power}"),
            Workload::LogNormal(sigma) => return format!("log-normal:{sigma}"),
        };
        fixed.to_string()
    }

    /// The routing counts of a layer in a step. Shape `[N, E]`.
    ///
    /// # Errors
    ///
    /// [`WorkloadError`] if the shape makes no workload, or not this one.
    pub fn counts(self, shape: &WorkloadShape, layer: usize, step: usize) -> Result<RoutingCounts, WorkloadError> {
        shape.check()?;
        self.check(shape)?;
        let tokens = self.tokens(shape, layer, step);
        let (ranks, experts) = (shape.num_ranks(), shape.num_experts);
        let mut counts = Vec::with_capacity(ranks * experts);
        for node in 0..shape.topology.num_nodes() {
            let shares = shares::of_node(self, shape, layer, step, node)?;
            for rank in shape.topology.ranks_of(node) {
                if self == Workload::Balanced {
                    rows::push_exact(&mut counts, &shares, rank, tokens[rank], shape.topk);
                } else {
                    let at = (step * ranks + rank) as u64;
                    let mut draws = Draws::new(shape.seed, layer, Purpose::Sampling, at);
                    rows::push_sampled(&mut counts, &shares, tokens[rank], shape.topk, &mut draws);
                }
            }
        }
        Ok(RoutingCounts::new(ranks, experts, counts)?)
    }

    /// The counts of the first steps of some layers.
    ///
    /// # Errors
    ///
    /// As [`Workload::counts`]; [`PlannerError::Zero`](crate::PlannerError::Zero) for no layers or steps.
    pub fn trace(self, shape: &WorkloadShape, layers: usize, steps: usize) -> Result<Trace, WorkloadError> {
        let mut counts = BTreeMap::new();
        for layer in 0..layers {
            for step in 0..steps {
                counts.insert((layer, step), self.counts(shape, layer, step)?);
            }
        }
        Ok(Trace::new(counts)?)
    }

    /// Tokens of each rank, `N * T` in all. Shape `[N]`.
    fn tokens(self, shape: &WorkloadShape, layer: usize, step: usize) -> Vec<u32> {
        let (ranks, mean) = (shape.num_ranks(), shape.tokens_per_rank);
        if self != Workload::SourceRagged {
            return vec![mean; ranks];
        }
        let mut draws = Draws::new(shape.seed, layer, Purpose::Tokens, step as u64);
        let weights: Vec<f64> = (0..ranks).map(|_| 0.1 + 1.8 * draws.unit()).collect();
        let sum: f64 = weights.iter().sum();
        // Each rank ends where its share of all tokens ends, so that none is lost to rounding.
        let total = ranks as f64 * f64::from(mean);
        let (mut so_far, mut given) = (0.0, 0u64);
        let mut tokens = Vec::with_capacity(ranks);
        for (rank, weight) in weights.iter().enumerate() {
            so_far += weight / sum * total;
            let end = if rank + 1 == ranks { ranks as u64 * u64::from(mean) } else { so_far as u64 };
            tokens.push((end - given) as u32);
            given = end;
        }
        tokens
    }

    /// Checks that the workload's numbers are possible.
    fn check(self, shape: &WorkloadShape) -> Result<(), WorkloadError> {
        let impossible = |problem: String| Err(WorkloadError::Impossible { workload: self, problem });
        match self {
            Workload::HotShare { percent, experts } => {
                let most = 100.0 * experts as f64 / shape.topk as f64;
                if !(1..=shape.num_experts).contains(&experts) {
                    impossible(format!("there are {} experts", shape.num_experts))
                } else if percent > 100 {
                    impossible("a share is at most 100 %".into())
                } else if f64::from(percent) > most {
                    impossible(format!(
                        "with {} experts per token, {experts} get at most {most:.0} % of the assignments",
                        shape.topk
                    ))
                } else {
                    Ok(())
                }
            }
            Workload::ZipfImbalance(x) if !(1.0..1e6).contains(&x) => impossible("max/mean is at least 1".into()),
            Workload::ZipfPower(x) if !(0.0..=10.0).contains(&x) => impossible("powers are 0 to 10".into()),
            Workload::LogNormal(x) if !(0.0..=10.0).contains(&x) => impossible("sigmas are 0 to 10".into()),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// A workload that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "there is no workload `{0}`; choose one of {fixed}, PERCENT:EXPERTS (as 80:4), zipf:MAX_OVER_MEAN, \
     zipf-power:POWER, log-normal:SIGMA",
    fixed = FIXED.map(Workload::name).join(", ")
)]
pub struct UnknownWorkload(String);

/// Workloads whose names have no numbers in them.
const FIXED: [Workload; 12] = [
    Workload::Balanced,
    Workload::HotExpertSet,
    Workload::HotRank,
    Workload::SpreadHotExperts,
    Workload::SourceRagged,
    Workload::ZeroExpertRank,
    Workload::RotatingHotspot,
    Workload::Burst,
    Workload::SuddenShift,
    Workload::SlowDrift,
    Workload::Periodic,
    Workload::NearUniform,
];

impl FromStr for Workload {
    type Err = UnknownWorkload;

    /// Names as [`Workload::name`] gives them, those of W0 to W7 also as `W0` or `W0_balanced`.
    fn from_str(name: &str) -> Result<Self, UnknownWorkload> {
        let plain = name.to_ascii_lowercase().replace('_', "-");
        let is_called = |workload: &Workload| {
            let full = workload.name();
            full == plain || (full.starts_with('w') && full.split('-').next() == Some(&plain))
        };
        if let Some(workload) = FIXED.into_iter().find(is_called) {
            return Ok(workload);
        }
        let with_numbers = || {
            let (kind, number) = plain.split_once(':')?;
            let real = || number.parse::<f64>().ok();
            match kind {
                "zipf" => real().map(Workload::ZipfImbalance),
                "zipf-power" => real().map(Workload::ZipfPower),
                "log-normal" => real().map(Workload::LogNormal),
                percent => Some(Workload::HotShare { percent: percent.parse().ok()?, experts: number.parse().ok()? }),
            }
        };
        with_numbers().ok_or_else(|| UnknownWorkload(name.to_string()))
    }
}
