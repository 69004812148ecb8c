//! What groups of which size make of worlds of which size.

use super::{ClusterSpec, GroupSpec, ModelSpec, Outcome, Simulator, SimulatorError, SyntheticRouting, TraceRun};
use crate::PlannerStrategy;

/// Groups of a world that are drawn at most. The slowest of more would be a little slower.
const MOST_GROUPS: usize = 64;
/// Layers that are drawn, for all of the model's in turn.
const LAYERS: usize = 2;

/// How to compare sizes of groups.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScaleRun {
    /// Routing that is drawn.
    pub routing: SyntheticRouting,
    /// Steps at the start that do not count.
    pub skip_steps: usize,
    /// Who plans.
    pub strategy: PlannerStrategy,
    /// Optimizer state is cut.
    pub zero: bool,
    /// Larger groups are not tried: planning them takes long, and they are seldom best.
    pub most_group_ranks: usize,
}

/// A world of ranks in groups of one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScalePoint {
    /// World size `W`.
    pub world_size: usize,
    /// Ranks `M` that share the experts.
    pub group_ranks: usize,
    /// Slots a rank `C`.
    pub slots_per_rank: usize,
    /// The step, and how balanced it is.
    pub outcome: Outcome,
    /// Tokens a second of all ranks.
    pub tokens_per_second: f64,
    /// Share of the data sheet's FLOP/s, recomputation not counted; 0 if the cluster's file does not tell these.
    pub share_of_peak: f64,
    /// Bytes of the most loaded rank at its most.
    pub memory_bytes: u64,
    /// Whether that fits; `None` if the cluster's file does not tell a rank's memory.
    pub fits: Option<bool>,
}

impl ScaleRun {
    /// All sizes of groups that a world of so many ranks of this cluster's nodes can have, from the smallest. Each rank has as many
    /// tokens as the model's file says: weak scaling.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] if the ranks are no whole nodes, and as [`Simulator::run_groups`].
    pub fn points(
        &self,
        cluster: &ClusterSpec,
        model: &ModelSpec,
        world_size: usize,
    ) -> Result<Vec<ScalePoint>, SimulatorError> {
        if world_size == 0 || !world_size.is_multiple_of(cluster.ranks_per_node) {
            let expected = format!("a multiple of the {} ranks of a node", cluster.ranks_per_node);
            return Err(SimulatorError::setting("ranks", world_size, expected));
        }
        let cluster = ClusterSpec { nodes: world_size / cluster.ranks_per_node, ..cluster.clone() };
        let whole = Simulator::new(cluster, model.clone())?;
        let sizes = GroupSpec::sizes(whole.cluster(), whole.model());
        sizes
            .into_iter()
            .filter(|&ranks| ranks <= self.most_group_ranks)
            .map(|ranks| self.point(&whole, ranks))
            .collect()
    }

    fn point(&self, whole: &Simulator, ranks: usize) -> Result<ScalePoint, SimulatorError> {
        let simulator = whole.clone().with_groups(GroupSpec { ranks, zero: self.zero })?;
        let (cluster, model) = (simulator.cluster(), simulator.model());
        let world_size = cluster.world_size();
        let groups = (world_size / ranks).min(MOST_GROUPS);
        let run = TraceRun {
            skip_steps: self.skip_steps,
            seed: self.routing.seed,
            repair: self.strategy == PlannerStrategy::MinMax,
        };
        let traces = (0..groups).map(|group| self.routing.group_trace(&simulator, group, LAYERS));
        let outcome = simulator.run_groups(traces, run, self.strategy)?;
        let tokens = model.tokens() * model.micro_batches as f64;
        let seconds = outcome.time.total();
        let flops = tokens * model.training_flops_per_token() / seconds;
        let memory_bytes = simulator.memory(outcome.slowest_max_over_mean.max(1.0))?.peak().bytes;
        Ok(ScalePoint {
            world_size,
            group_ranks: ranks,
            slots_per_rank: model.slots(ranks),
            outcome,
            tokens_per_second: tokens * world_size as f64 / seconds,
            share_of_peak: if cluster.peak_flops_per_second > 0.0 {
                flops / cluster.peak_flops_per_second
            } else {
                0.0
            },
            memory_bytes,
            fits: cluster.usable_memory_bytes().map(|limit| memory_bytes <= limit),
        })
    }
}

impl ScalePoint {
    /// The fastest of those that fit, or are not known not to.
    pub fn best(points: &[Self]) -> Option<&Self> {
        let fits = points.iter().filter(|point| point.fits != Some(false));
        fits.min_by(|a, b| a.outcome.time.total().total_cmp(&b.outcome.time.total()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::model::tests::{small_cluster, small_model};

    fn run(zero: bool) -> ScaleRun {
        let routing = SyntheticRouting { sigma: 0.5, steps: 3, seed: 1 };
        ScaleRun { routing, skip_steps: 1, strategy: PlannerStrategy::MinMax, zero, most_group_ranks: 16 }
    }

    #[test]
    fn larger_groups_take_less_memory_and_the_fastest_that_fits_is_best() {
        let model = ModelSpec { slots_per_rank: 0, ..small_model() };
        let points = run(false).points(&small_cluster(), &model, 16).unwrap();
        assert_eq!(points.iter().map(|point| point.group_ranks).collect::<Vec<_>>(), [1, 2, 4, 8, 16]);
        assert!(points.iter().all(|point| point.fits.is_none() && point.outcome.slowest_max_over_mean >= 1.0));
        let limit = points[3].memory_bytes as f64 + 1e6;
        let cluster = ClusterSpec { memory_bytes_per_rank: limit / 0.9, ..small_cluster() };
        let points = run(false).points(&cluster, &model, 16).unwrap();
        assert_eq!(points[0].fits, Some(false));
        assert_eq!(points[3].fits, Some(true));
        let best = ScalePoint::best(&points).unwrap();
        assert!(best.fits == Some(true) && best.outcome.time.total() <= points[3].outcome.time.total());
    }

    #[test]
    fn zero_takes_less_memory_where_there_are_replicas() {
        let model = ModelSpec { slots_per_rank: 0, ..small_model() };
        let (plain, zero) = (run(false), run(true));
        let [plain, zero] = [plain, zero].map(|run| run.points(&small_cluster(), &model, 8).unwrap());
        assert!(
            plain.iter().zip(&zero).filter(|(a, _)| a.group_ranks < 8).all(|(a, b)| b.memory_bytes < a.memory_bytes)
        );
    }

    #[test]
    fn worlds_are_whole_nodes() {
        for ranks in [0, 3] {
            let error = run(false).points(&small_cluster(), &small_model(), ranks).unwrap_err();
            assert_eq!(error.field(), Some("ranks"));
        }
    }
}
