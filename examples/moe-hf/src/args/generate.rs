use std::path::PathBuf;

use clap::Args;

use super::{ParallelArgs, command::refuse};
use crate::MoeHfError;

/// Options of `generate`.
#[derive(Args, Debug, Clone)]
pub struct GenerateArgs {
    /// The model's folder.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Text that is continued.
    #[arg(long)]
    pub prompt: String,
    /// Tokens to generate.
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// 0 always takes the most probable token; 1 draws them as the model gives them.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.7)]
    pub temperature: f64,
    /// Seed of what is drawn.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Where it is done.
    #[command(flatten)]
    pub parallel: ParallelArgs,
}

impl GenerateArgs {
    pub(crate) fn check(&self) -> Result<(), MoeHfError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse(format!("--temperature must not be negative, got {}", self.temperature));
        }
        Ok(())
    }
}
