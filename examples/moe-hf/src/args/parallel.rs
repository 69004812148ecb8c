use burn::tensor::FloatDType;
use burn_fsep::launch::Ranks;
use clap::{Args, ValueEnum};
use rank_args::RankArgs;

use super::command::refuse;
use crate::MoeHfError;

/// Ranks, what they compute on, and how they share the experts.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Ranks")]
pub struct ParallelArgs {
    /// How many ranks, on what, and how they exchange.
    #[command(flatten)]
    pub ranks: RankArgs,
    /// Types of parameters and computation.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub dtype: Dtype,
    /// Leave the experts where they are: static expert parallelism's layout, without a planner.
    #[arg(long)]
    pub no_planner: bool,
}

/// Types of parameters and computation.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// Single precision.
    F32,
    /// Parameters, gradients and optimizer state in single precision, computation in bfloat16.
    Mixed,
    /// All in bfloat16.
    Bf16,
}

impl Dtype {
    /// Of the parameters.
    pub(crate) fn parameters(self) -> FloatDType {
        match self {
            Self::F32 | Self::Mixed => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
        }
    }

    /// Of the computation.
    pub(crate) fn compute(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Mixed | Self::Bf16 => FloatDType::BF16,
        }
    }
}

impl ParallelArgs {
    /// Checks the options and what the environment says; returns the ranks in this process, `threads` without a launcher and
    /// `--ranks`.
    ///
    /// # Errors
    ///
    /// [`MoeHfError`] naming the first option or variable that cannot work.
    pub(crate) fn init(&self, threads: usize) -> Result<Ranks, MoeHfError> {
        self.ranks.check("moe-hf").or_else(refuse)?;
        let ranks = self.ranks.rank_config(threads).init()?;
        self.ranks.check_launcher(&ranks).or_else(refuse)?;
        Ok(ranks)
    }
}
