use burn_fsep::planner::PlannerStrategy;
use clap::{Args, ValueEnum};
use rank_args::RankArgs;

use super::command::{check_positive, refuse};
use crate::MoeLmError;

/// Ranks, where they compute, and how they share the experts.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Ranks")]
pub struct ParallelArgs {
    /// How many ranks, on what, and how they exchange.
    #[command(flatten)]
    pub ranks: RankArgs,
    /// Ranks on a node [default: as the launcher says; without one, all].
    #[arg(long)]
    pub ranks_per_node: Option<usize>,
    /// How experts are laid out over ranks: by the paper's planner, by ours, fixed (static expert parallelism), or anew in each
    /// step.
    #[arg(long, value_enum, default_value_t = Planner::MinMax)]
    pub planner: Planner,
    /// Let every layer restore its experts and return its gradients by itself, with nothing behind compute.
    #[arg(long)]
    pub no_prefetch: bool,
}

/// How experts are laid out over ranks.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planner {
    /// The planner of LAER-MoE.
    Paper,
    /// Robust layouts and exact dispatch.
    MinMax,
    /// As many replicas as loads want, at places that are drawn anew for each step, and exact dispatch: for tests.
    Random,
    /// Static expert parallelism with resident experts.
    Static,
}

impl Planner {
    pub(crate) fn strategy(self) -> PlannerStrategy {
        match self {
            Planner::Paper => PlannerStrategy::Paper,
            Planner::MinMax => PlannerStrategy::MinMax,
            Planner::Random => PlannerStrategy::Random,
            Planner::Static => PlannerStrategy::Static,
        }
    }
}

impl ParallelArgs {
    pub(super) fn check(&self) -> Result<(), MoeLmError> {
        check_positive([("--ranks-per-node", self.ranks_per_node.unwrap_or(1) as u64)])?;
        self.ranks.check("moe-lm").or_else(refuse)
    }
}
