use clap::Args;

use super::command::{check_positive, refuse};
use crate::MoeLmError;

/// Sizes and routing of the model.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Transformer layers.
    #[arg(long, default_value_t = 2)]
    pub layers: usize,
    /// Hidden size.
    #[arg(long, default_value_t = 128)]
    pub hidden: usize,
    /// Attention heads.
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Intermediate size of an expert.
    #[arg(long, default_value_t = 192)]
    pub ffn: usize,
    /// Experts in a layer.
    #[arg(long, default_value_t = 8)]
    pub experts: usize,
    /// Experts per token.
    #[arg(long, default_value_t = 2)]
    pub top_k: usize,
    /// Skews routing by adding random biases of this standard deviation to the routers' logits.
    #[arg(long, value_name = "STD", allow_negative_numbers = true)]
    pub force_biased: Option<f64>,
    /// Routes exactly these shares of the assignments to the experts, whatever the routers say: one share an expert,
    /// with commas between. They sum to 1, and none is above 1 / TOP_K.
    #[arg(long, value_name = "SHARES", value_delimiter = ',', allow_negative_numbers = true)]
    pub force_shares: Option<Vec<f64>>,
}

impl ModelArgs {
    pub(super) fn check(&self) -> Result<(), MoeLmError> {
        check_positive([
            ("--layers", self.layers as u64),
            ("--hidden", self.hidden as u64),
            ("--heads", self.heads as u64),
            ("--ffn", self.ffn as u64),
            ("--experts", self.experts as u64),
            ("--top-k", self.top_k as u64),
        ])?;
        if !self.hidden.is_multiple_of(self.heads) {
            return refuse(format!("--hidden {} is no multiple of --heads {}", self.hidden, self.heads));
        }
        if self.top_k > self.experts {
            return refuse(format!("--top-k {} is more than --experts {}", self.top_k, self.experts));
        }
        let bias = self.force_biased.unwrap_or(0.0);
        if !(bias.is_finite() && bias >= 0.0) {
            return refuse(format!("--force-biased must not be negative, got {bias}"));
        }
        if self.force_biased.is_some() && self.force_shares.is_some() {
            return refuse("--force-biased and --force-shares exclude each other".into());
        }
        self.force_shares.as_deref().map_or(Ok(()), |shares| self.check_shares(shares))
    }

    fn check_shares(&self, shares: &[f64]) -> Result<(), MoeLmError> {
        let (experts, largest) = (self.experts, 1.0 / self.top_k as f64);
        if shares.len() != experts {
            return refuse(format!("--force-shares has {} shares, --experts is {experts}", shares.len()));
        }
        if let Some(share) = shares.iter().find(|share| !(0.0..=largest + 1e-9).contains(*share)) {
            return refuse(format!(
                "--force-shares: {share} is not between 0 and {largest}; with --top-k {} no expert can have more",
                self.top_k
            ));
        }
        let sum: f64 = shares.iter().sum();
        if (sum - 1.0).abs() > 1e-6 {
            return refuse(format!("--force-shares must sum to 1, got {sum}"));
        }
        Ok(())
    }
}
