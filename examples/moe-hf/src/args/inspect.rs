use std::path::PathBuf;

use clap::Args;
use rank_args::Backend;

use super::{
    Dtype,
    command::{check_positive, refuse},
};
use crate::MoeHfError;

/// Options of `inspect`; names and defaults of a job's are those of `bench`.
#[derive(Args, Debug, Clone)]
pub struct InspectArgs {
    /// The model's folder; its config.json is enough.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Layers in place of the configuration's.
    #[arg(long)]
    pub layers: Option<usize>,
    /// Numbers of ranks [default: 1, 2, 4, .. 64, as far as --expert-parallel-size divides them].
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub ranks: Vec<usize>,
    /// Ranks that share the experts [default: all ranks].
    #[arg(long, value_name = "RANKS")]
    pub expert_parallel_size: Option<usize>,
    /// Experts that a rank restores at once [default: just enough for all experts, plus one].
    #[arg(long)]
    pub slots: Option<usize>,
    /// Last layers that keep their experts from forward to backward.
    #[arg(long, value_name = "LAYERS", default_value_t = 1)]
    pub kept_layers: usize,
    /// Types of parameters and computation.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub dtype: Dtype,
    /// What computes: LibTorch's kernels keep less of attention than Burn's operations.
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    pub backend: Backend,
    /// Sequences of each rank in a step.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 1024)]
    pub seq_len: usize,
    /// The optimizer's state is cut over ranks (ZeRO-1).
    #[arg(long)]
    pub sharded_optimizer: bool,
    /// GiB of a rank that tensors may take: fails, and says what would fit, if with none of the numbers of ranks the job does.
    #[arg(long, value_name = "GIB")]
    pub memory_gib: Option<f64>,
}

impl InspectArgs {
    pub(crate) fn check(&self) -> Result<(), MoeHfError> {
        for &ranks in &self.ranks {
            check_positive([("--ranks", ranks)])?;
        }
        check_positive([
            ("--layers", self.layers.unwrap_or(1)),
            ("--expert-parallel-size", self.expert_parallel_size.unwrap_or(1)),
            ("--slots", self.slots.unwrap_or(1)),
            ("--batch", self.batch),
            ("--seq-len", self.seq_len),
        ])?;
        match self.memory_gib {
            Some(gib) if !(gib.is_finite() && gib > 0.0) => {
                refuse(format!("--memory-gib must be a positive number, got {gib}"))
            }
            _ => Ok(()),
        }
    }

    /// The numbers of ranks in question.
    pub(crate) fn numbers_of_ranks(&self) -> Vec<usize> {
        if !self.ranks.is_empty() {
            return self.ranks.clone();
        }
        let size = self.expert_parallel_size.unwrap_or(1);
        let usual: Vec<usize> = (0..7).map(|i| 1 << i).filter(|ranks: &usize| ranks.is_multiple_of(size)).collect();
        // Groups of another size: from one of them on.
        if usual.is_empty() { (0..4).map(|i| size << i).collect() } else { usual }
    }
}
