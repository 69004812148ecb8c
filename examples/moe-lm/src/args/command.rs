use burn::tensor::FloatDType;
use burn_fsep::{ExpertParallelism, FSEPMoEConfig, launch::Ranks, moe::RouterForcing};
use clap::Parser;

use super::{ModelArgs, OutputArgs, ParallelArgs, Planner, TrainingArgs};
use crate::MoeLmError;

/// Trains a byte-level Mixture-of-Experts language model with fully sharded expert parallelism.
#[derive(Parser, Debug, Clone)]
#[command(version, about)]
pub struct Args {
    /// What is trained.
    #[command(flatten)]
    pub model: ModelArgs,
    /// How it is trained.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// What it is trained on.
    #[command(flatten)]
    pub parallel: ParallelArgs,
    /// What is read and written.
    #[command(flatten)]
    pub output: OutputArgs,
}

impl Args {
    /// Checks all options, and what the environment says, before any work begins; returns the ranks in this process.
    ///
    /// # Errors
    ///
    /// [`MoeLmError`] naming the first option or variable that cannot work.
    pub(crate) fn check(&self) -> Result<Ranks, MoeLmError> {
        self.parallel.check()?;
        self.model.check()?;
        self.training.check()?;
        self.output.check()?;
        if self.training.dense && self.output.record_trace.is_some() {
            return refuse("--record-trace needs ranks to route between; leave --dense out".into());
        }
        let plans =
            self.parallel.planner != Planner::MinMax || self.parallel.ranks.synchronous || self.parallel.no_prefetch;
        if self.training.dense && plans {
            return refuse(
                "--planner, --synchronous and --no-prefetch have no meaning with --dense: nothing is laid out over ranks"
                    .into(),
            );
        }
        let threads = if self.training.dense { 1 } else { 4 };
        let config = self.parallel.ranks.rank_config(threads).with_timeline(self.output.timeline.is_some());
        let ranks = config.init()?;
        self.check_launcher(&ranks)?;
        self.check_ranks(ranks.world_size())?;
        Ok(ranks)
    }

    /// What has to fit the launcher, which says how many ranks there are.
    fn check_launcher(&self, ranks: &Ranks) -> Result<(), MoeLmError> {
        self.parallel.ranks.check_launcher(ranks).or_else(refuse)?;
        let world_size = ranks.world_size();
        match (self.parallel.ranks.ranks, self.training.dense) {
            (Some(asked @ 2..), true) => {
                refuse(format!("--ranks {asked} contradicts --dense, which trains on one rank"))
            }
            (_, true) if world_size > 1 => {
                refuse(format!("--dense trains on one rank, but the launcher started {world_size}; start one process"))
            }
            _ => Ok(()),
        }
    }

    /// What has to fit the number of ranks.
    fn check_ranks(&self, ranks: usize) -> Result<(), MoeLmError> {
        let (batch, experts) = (self.training.batch, self.model.experts);
        if !batch.is_multiple_of(ranks) {
            return refuse(format!("--batch {batch} cannot be split evenly over {ranks} ranks"));
        }
        let is_static = self.parallel.planner == Planner::Static;
        if is_static && self.parallel.ranks.slots.is_some() {
            return refuse(
                "--slots has no meaning with --planner static: each rank holds the experts that it owns".into(),
            );
        }
        if is_static && !experts.is_multiple_of(ranks) {
            return refuse(format!(
                "--planner static needs equally many experts on every rank: --experts {experts} is no multiple of {ranks}"
            ));
        }
        if let Some(slots) = self.parallel.ranks.slots
            && (slots > experts || slots.saturating_mul(ranks) < experts)
        {
            return refuse(format!(
                "--slots {slots} on {ranks} ranks cannot hold {experts} experts: it must be between {} and {experts}",
                experts.div_ceil(ranks),
            ));
        }
        if let Some(ranks_per_node) = self.parallel.ranks_per_node
            && (ranks_per_node > ranks || !ranks.is_multiple_of(ranks_per_node))
        {
            return refuse(format!("--ranks-per-node {ranks_per_node} does not divide {ranks} ranks into equal nodes"));
        }
        Ok(())
    }

    /// Element type of the blocks' computation, where it is not the parameters'.
    pub(crate) fn compute_dtype(&self) -> Option<FloatDType> {
        self.training.mixed_precision.then_some(FloatDType::BF16)
    }

    pub(crate) fn moe_config(&self) -> FSEPMoEConfig {
        let (model, parallel) = (&self.model, &self.parallel);
        let is_static = parallel.planner == Planner::Static;
        let shares = model.force_shares.clone().map(RouterForcing::Shares);
        FSEPMoEConfig::new(model.hidden, model.ffn, model.experts)
            .with_moe_router_topk(model.top_k)
            .with_slots_per_rank(if is_static { None } else { parallel.ranks.slots })
            .with_expert_parallelism(if is_static { ExpertParallelism::Static } else { ExpertParallelism::Fsep })
            .with_moe_aux_loss_coeff(self.training.aux_loss)
            .with_moe_router_force(shares.or(model.force_biased.map(RouterForcing::Biased)))
            .with_compute_dtype(self.compute_dtype())
    }
}

/// The error of an option.
pub(super) fn refuse<T>(message: String) -> Result<T, MoeLmError> {
    Err(MoeLmError::Option(message))
}

/// Numbers that have to be at least 1.
pub(super) fn check_positive<const N: usize>(numbers: [(&str, u64); N]) -> Result<(), MoeLmError> {
    match numbers.into_iter().find(|(_, value)| *value == 0) {
        Some((name, _)) => refuse(format!("{name} must be at least 1")),
        None => Ok(()),
    }
}
