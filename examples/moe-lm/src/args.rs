use std::path::{Path, PathBuf};

use burn_fsep::{ExpertParallelism, FSEPMoEConfig};
use burn_fsep_planner::Strategy;
use clap::{Parser, ValueEnum};

use crate::MoeLmError;

/// Trains a byte-level Mixture-of-Experts language model with fully sharded expert parallelism.
#[derive(Parser, Debug, Clone)]
#[command(version, about)]
pub struct Args {
    /// Ranks: threads of this process, each with its shard of every expert.
    #[arg(long, default_value_t = 4)]
    pub ranks: usize,
    /// Sequences in a step, over all ranks.
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Bytes in a sequence.
    #[arg(long, default_value_t = 128)]
    pub context: usize,
    /// Transformer layers.
    #[arg(long, default_value_t = 3)]
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
    /// Experts that a rank restores at once [default: just enough for all experts, plus one].
    #[arg(long)]
    pub slots: Option<usize>,
    /// Ranks on a node [default: all].
    #[arg(long)]
    pub ranks_per_node: Option<usize>,
    /// Optimizer steps.
    #[arg(long, default_value_t = 900)]
    pub steps: usize,
    /// Batches of held-out text that the model is validated on.
    #[arg(long, default_value_t = 16)]
    pub valid_batches: usize,
    /// Highest learning rate; it falls to a tenth along a cosine.
    #[arg(long, allow_negative_numbers = true, default_value_t = 3e-3)]
    pub lr: f64,
    /// Largest global gradient norm.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub clip: f64,
    /// Weight of the load-balancing auxiliary loss; none is needed.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0)]
    pub aux_loss: f64,
    /// Skews routing by adding random biases of this standard deviation to the routers' logits.
    #[arg(long, allow_negative_numbers = true)]
    pub force_biased: Option<f64>,
    /// Seed of initial values and of the order of the data.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// How experts are laid out over ranks: by the paper's planner, by ours, or fixed (static expert parallelism).
    #[arg(long, value_enum, default_value_t = Planner::MinMax)]
    pub planner: Planner,
    /// Wait for the planner in each step, so that a run can be repeated bit for bit.
    #[arg(long)]
    pub synchronous: bool,
    /// Train the same model with an ordinary MoE layer on the whole batch: the reference that FSEP equals.
    #[arg(long)]
    pub dense: bool,
    /// Text to train on [default: Rust sources of this program's dependencies].
    #[arg(long, num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// Folder for metrics (metrics.jsonl) and curves (curves.html).
    #[arg(long, default_value = "out/moe-lm")]
    pub out: PathBuf,
    /// Also write the summary to this file, as JSON.
    #[arg(long)]
    pub summary: Option<PathBuf>,
    /// Also write the routing counts of all steps to this file, for `fsep-planner replay`.
    #[arg(long)]
    pub record_trace: Option<PathBuf>,
    /// Save a checkpoint to OUT/checkpoints every so many steps, and when the job is told to stop (SIGTERM).
    #[arg(long, value_name = "STEPS")]
    pub checkpoint_every: Option<u64>,
    /// Checkpoints to keep.
    #[arg(long, default_value_t = 2)]
    pub keep: usize,
    /// Go on from a checkpoint, also with another number of ranks: `auto` for the newest whole one in OUT/checkpoints, or
    /// from the start if there is none; or a checkpoint's folder.
    #[arg(long, value_name = "auto|PATH")]
    pub resume: Option<PathBuf>,
    /// Bytes of text to generate at the end.
    #[arg(long, default_value_t = 240)]
    pub sample: usize,
}

/// How experts are laid out over ranks.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planner {
    /// The planner of LAER-MoE.
    Paper,
    /// Robust layouts and exact dispatch.
    MinMax,
    /// Static expert parallelism with resident experts.
    Static,
}

impl Planner {
    pub(crate) fn strategy(self) -> Strategy {
        match self {
            Planner::Paper => Strategy::Paper,
            Planner::MinMax => Strategy::MinMax,
            Planner::Static => Strategy::Static,
        }
    }
}

impl Args {
    /// Ranks that train: one if the model is dense.
    pub fn world_size(&self) -> usize {
        if self.dense { 1 } else { self.ranks }
    }

    /// Checks all options before any work begins.
    ///
    /// # Errors
    ///
    /// [`MoeLmError::Option`] naming the first option that cannot work.
    pub fn check(&self) -> Result<(), MoeLmError> {
        let fail = |message: String| Err(MoeLmError::Option(message));
        for (name, value) in [
            ("--ranks", self.ranks),
            ("--batch", self.batch),
            ("--context", self.context),
            ("--layers", self.layers),
            ("--hidden", self.hidden),
            ("--heads", self.heads),
            ("--ffn", self.ffn),
            ("--experts", self.experts),
            ("--top-k", self.top_k),
            ("--steps", self.steps),
            ("--valid-batches", self.valid_batches),
            ("--ranks-per-node", self.ranks_per_node.unwrap_or(1)),
            ("--checkpoint-every", self.checkpoint_every.unwrap_or(1) as usize),
            ("--keep", self.keep),
        ] {
            if value == 0 {
                return fail(format!("{name} must be at least 1"));
            }
        }
        if !self.batch.is_multiple_of(self.ranks) {
            return fail(format!("--batch {} cannot be split evenly over --ranks {}", self.batch, self.ranks));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            return fail(format!("--hidden {} is no multiple of --heads {}", self.hidden, self.heads));
        }
        if self.top_k > self.experts {
            return fail(format!("--top-k {} is more than --experts {}", self.top_k, self.experts));
        }
        if let Some(slots) = self.slots
            && (slots == 0 || slots > self.experts || slots * self.ranks < self.experts)
        {
            return fail(format!(
                "--slots {slots} on {} ranks cannot hold {} experts: it must be between {} and {}",
                self.ranks,
                self.experts,
                self.experts.div_ceil(self.ranks),
                self.experts
            ));
        }
        if self.planner == Planner::Static && self.slots.is_some() {
            return fail(
                "--slots has no meaning with --planner static: each rank holds the experts that it owns".into(),
            );
        }
        for (name, file) in [("--summary", &self.summary), ("--record-trace", &self.record_trace)] {
            let folder = file.as_deref().and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty());
            if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
                return fail(format!("{name}: there is no folder {} to write to", folder.display()));
            }
        }
        if self.planner == Planner::Static && !self.experts.is_multiple_of(self.ranks) {
            return fail(format!(
                "--planner static needs equally many experts on every rank: --experts {} is no multiple of --ranks {}",
                self.experts, self.ranks
            ));
        }
        if self.dense && self.record_trace.is_some() {
            return fail("--record-trace needs ranks to route between; leave --dense out".into());
        }
        for (name, value) in [("--lr", self.lr), ("--clip", self.clip)] {
            if !(value.is_finite() && value > 0.0) {
                return fail(format!("{name} must be a positive number, got {value}"));
            }
        }
        if self.lr >= 1.0 {
            return fail(format!("--lr must be below 1, got {}", self.lr));
        }
        for (name, value) in [("--aux-loss", self.aux_loss), ("--force-biased", self.force_biased.unwrap_or(0.0))] {
            if !(value.is_finite() && value >= 0.0) {
                return fail(format!("{name} must not be negative, got {value}"));
            }
        }
        Ok(())
    }

    pub(crate) fn moe_config(&self) -> FSEPMoEConfig {
        let is_static = self.planner == Planner::Static;
        FSEPMoEConfig::new(self.hidden, self.ffn, self.experts)
            .with_moe_router_topk(self.top_k)
            .with_slots_per_rank(if is_static { None } else { self.slots })
            .with_expert_parallelism(if is_static { ExpertParallelism::Static } else { ExpertParallelism::Fsep })
            .with_moe_aux_loss_coeff(self.aux_loss)
            .with_moe_router_force_biased(self.force_biased)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_options_are_refused_with_their_name() {
        for (options, named) in [
            ("--ranks 0", "--ranks"),
            ("--ranks 3", "--batch"),
            ("--heads 5", "--hidden"),
            ("--top-k 9", "--top-k"),
            ("--slots 1", "--slots"),
            ("--slots 9", "--slots"),
            ("--experts 6 --planner static", "--experts"),
            ("--lr 0", "--lr"),
            ("--lr NaN", "--lr"),
            ("--aux-loss -1", "--aux-loss"),
            ("--steps 0", "--steps"),
            ("--ranks-per-node 0", "--ranks-per-node"),
            ("--slots 3 --planner static", "--slots"),
            ("--summary no/such/folder/x.json", "--summary"),
            ("--dense --record-trace x.csv", "--record-trace"),
            ("--checkpoint-every 0", "--checkpoint-every"),
            ("--keep 0", "--keep"),
        ] {
            let words = std::iter::once("moe-lm").chain(options.split(' '));
            let message = match Args::try_parse_from(words) {
                Ok(args) => args.check().unwrap_err().to_string(),
                Err(error) => error.to_string(),
            };
            assert!(message.contains(named), "{options}: {message}");
        }
        Args::parse_from(["moe-lm"]).check().unwrap();
    }
}
