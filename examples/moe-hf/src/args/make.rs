use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::command::{check_positive, refuse};
use crate::MoeHfError;

/// Options of `make`.
#[derive(Args, Debug, Clone)]
pub struct MakeArgs {
    /// New folder for the model.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Which family's model.
    #[arg(long, value_enum, default_value_t = MakeFamily::Qwen3Moe)]
    pub family: MakeFamily,
    /// Hidden size.
    #[arg(long, default_value_t = 128)]
    pub hidden: usize,
    /// Layers.
    #[arg(long, default_value_t = 2)]
    pub layers: usize,
    /// Experts in a layer.
    #[arg(long, default_value_t = 8)]
    pub experts: usize,
    /// Experts a token.
    #[arg(long, default_value_t = 2)]
    pub top_k: usize,
    /// Intermediate size of an expert.
    #[arg(long, default_value_t = 192)]
    pub ffn: usize,
    /// Seed of the values.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

/// Families of models that can be made.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum MakeFamily {
    /// Mixtral.
    Mixtral,
    /// OLMoE.
    Olmoe,
    /// Qwen3-MoE.
    Qwen3Moe,
}

impl MakeArgs {
    /// Those of the model that `finetune` makes by itself.
    pub(crate) fn tiny(output: PathBuf, seed: u64) -> Self {
        let family = MakeFamily::Qwen3Moe;
        Self { output, family, hidden: 128, layers: 2, experts: 8, top_k: 2, ffn: 192, seed }
    }

    pub(crate) fn check(&self) -> Result<(), MoeHfError> {
        check_positive([
            ("--hidden", self.hidden),
            ("--layers", self.layers),
            ("--experts", self.experts),
            ("--top-k", self.top_k),
            ("--ffn", self.ffn),
        ])?;
        if self.top_k > self.experts {
            return refuse(format!("--top-k {} is more than --experts {}", self.top_k, self.experts));
        }
        if !self.hidden.is_multiple_of(8) {
            return refuse(format!("--hidden {} is no multiple of 8, as four heads of an even size need", self.hidden));
        }
        Ok(())
    }
}
