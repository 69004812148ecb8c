use std::path::PathBuf;

use clap::Args;

use super::command::{check_positive, refuse};
use crate::MoeLmError;

/// Data and optimization.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Text to train on [default: Rust sources of this program's dependencies].
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// Sequences in a step, over all ranks.
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Bytes in a sequence.
    #[arg(long, default_value_t = 128)]
    pub context: usize,
    /// Optimizer steps.
    #[arg(long, default_value_t = 300)]
    pub steps: usize,
    /// Batches of held-out text that the model is validated on.
    #[arg(long, default_value_t = 16)]
    pub valid_batches: usize,
    /// Highest learning rate; it falls to a tenth along a cosine.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.5e-3)]
    pub lr: f64,
    /// Largest global gradient norm.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub clip: f64,
    /// Weight of the load-balancing auxiliary loss; none is needed.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0)]
    pub aux_loss: f64,
    /// Seed of initial values and of the order of the data.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Compute the blocks in bfloat16; parameters, optimizer state, embeddings and the loss stay in single precision.
    #[arg(long)]
    pub mixed_precision: bool,
    /// Train the same model with an ordinary MoE layer on the whole batch: the reference that FSEP equals.
    #[arg(long)]
    pub dense: bool,
}

impl TrainingArgs {
    /// Bytes in a step.
    pub(crate) fn tokens_per_step(&self) -> usize {
        self.batch * self.context
    }

    pub(super) fn check(&self) -> Result<(), MoeLmError> {
        check_positive([
            ("--batch", self.batch as u64),
            ("--context", self.context as u64),
            ("--steps", self.steps as u64),
            ("--valid-batches", self.valid_batches as u64),
        ])?;
        let sequences = self.batch.checked_mul(self.steps.max(self.valid_batches));
        if sequences.and_then(|sequences| sequences.checked_mul(self.context)).is_none() {
            return refuse(format!(
                "--batch {} --context {} --steps {} --valid-batches {}: more bytes than can be counted",
                self.batch, self.context, self.steps, self.valid_batches
            ));
        }
        for (name, value) in [("--lr", self.lr), ("--clip", self.clip)] {
            if !(value.is_finite() && value > 0.0) {
                return refuse(format!("{name} must be a positive number, got {value}"));
            }
        }
        if self.lr >= 1.0 {
            return refuse(format!("--lr must be below 1, got {}", self.lr));
        }
        if !(self.aux_loss.is_finite() && self.aux_loss >= 0.0) {
            return refuse(format!("--aux-loss must not be negative, got {}", self.aux_loss));
        }
        Ok(())
    }
}
