use std::path::{Path, PathBuf};

use clap::Args;

use super::{
    MemoryArgs, ParallelArgs,
    command::{check_positive, refuse},
};
use crate::MoeHfError;

/// Options of `finetune`.
#[derive(Args, Debug, Clone)]
pub struct FinetuneArgs {
    /// The model's folder [default: a tiny one is made in target/moe-hf/tiny].
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Text to train on [default: the sources of burn-fsep].
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// How it is trained.
    #[command(flatten)]
    pub optimizer: OptimizerArgs,
    /// New folder for the fine-tuned model [default: target/moe-hf/finetuned, in place of the last one].
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Also write losses and imbalance of all steps to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,
    /// Also write the routing counts of all steps to this file, for `fsep-planner replay`.
    #[arg(long, value_name = "FILE")]
    pub record_trace: Option<PathBuf>,
    /// Tokens of text to generate at the end.
    #[arg(long, value_name = "TOKENS", default_value_t = 160)]
    pub sample: usize,
    /// Of what memory is taken.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Where it is done.
    #[command(flatten)]
    pub parallel: ParallelArgs,
}

/// How a model is trained.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Training")]
pub struct OptimizerArgs {
    /// Optimizer steps; with 0 the model is saved as it was loaded.
    #[arg(long, default_value_t = 300)]
    pub steps: usize,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 128)]
    pub seq_len: usize,
    /// Sequences in a step, over all ranks.
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Learning rate.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1e-3)]
    pub lr: f64,
    /// Weight decay.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// Largest global gradient norm.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub clip: f64,
    /// Leave the routers as they are.
    #[arg(long)]
    pub freeze_router: bool,
    /// Weight of the load-balancing loss, which is transformers' own [default: router_aux_loss_coef of config.json].
    #[arg(long, allow_negative_numbers = true)]
    pub aux_loss_coeff: Option<f64>,
    /// Seed of the order of the text.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
}

impl FinetuneArgs {
    pub(crate) fn check(&self) -> Result<(), MoeHfError> {
        let OptimizerArgs { seq_len, batch, lr, weight_decay, clip, .. } = self.optimizer;
        check_positive([("--seq-len", seq_len), ("--batch", batch)])?;
        if seq_len < 2 {
            return refuse("--seq-len must be at least 2: each token is predicted from those before it".into());
        }
        // Positions in a batch are 32-bit numbers.
        let tokens = seq_len.checked_add(1).and_then(|len| len.checked_mul(batch));
        if tokens.is_none_or(|tokens| tokens > i32::MAX as usize) {
            return refuse(format!("--batch {batch} of --seq-len {seq_len} are more tokens than a step can have"));
        }
        for (name, value) in [("--lr", lr), ("--clip", clip)] {
            if !(value.is_finite() && value > 0.0) {
                return refuse(format!("{name} must be a positive number, got {value}"));
            }
        }
        for (name, value) in
            [("--weight-decay", weight_decay), ("--aux-loss-coeff", self.optimizer.aux_loss_coeff.unwrap_or(0.0))]
        {
            if !(value.is_finite() && value >= 0.0) {
                return refuse(format!("{name} must not be negative, got {value}"));
            }
        }
        if self.optimizer.steps == 0 && self.record_trace.is_some() {
            return refuse("--record-trace needs steps to record; --steps is 0".into());
        }
        if let Some(output) = self.output.as_deref().filter(|output| output.exists()) {
            return refuse(format!("--output: {} is there already: give a new folder", output.display()));
        }
        Ok(())
    }

    /// The folder for the fine-tuned model.
    pub(crate) fn output(&self) -> PathBuf {
        self.output.clone().unwrap_or_else(|| Path::new(OWN_FOLDER).join("finetuned"))
    }

    /// The folder of the model that is trained.
    pub(crate) fn model(&self) -> PathBuf {
        self.model.clone().unwrap_or_else(|| Path::new(OWN_FOLDER).join("tiny"))
    }
}

/// Where the program writes what it is not told a place for.
const OWN_FOLDER: &str = "target/moe-hf";
