use std::path::PathBuf;

use clap::Args;

use super::{MemoryArgs, ParallelArgs, command::check_positive};
use crate::MoeHfError;

/// Options of `bench`.
#[derive(Args, Debug, Clone)]
pub struct BenchArgs {
    /// A model's folder, of which only config.json is read.
    #[arg(long, value_name = "DIR")]
    pub config_only: PathBuf,
    /// A text whose bytes are the tokens, in place of random ones: experts are chosen, and the loss falls, as with what is learned.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Layers in place of the configuration's.
    #[arg(long)]
    pub layers: Option<usize>,
    /// Sequences of each rank in a step.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 1024)]
    pub seq_len: usize,
    /// Steps before those that are measured.
    #[arg(long, default_value_t = 3)]
    pub warmup: usize,
    /// Steps that are measured.
    #[arg(long, default_value_t = 10)]
    pub steps: usize,
    /// Seed of values and tokens.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Of what memory is taken.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Where it is done.
    #[command(flatten)]
    pub parallel: ParallelArgs,
}

impl BenchArgs {
    pub(crate) fn check(&self) -> Result<(), MoeHfError> {
        check_positive([
            ("--layers", self.layers.unwrap_or(1)),
            ("--batch", self.batch),
            ("--seq-len", self.seq_len.saturating_sub(1)),
            ("--steps", self.steps),
        ])
    }
}
