//! What travels, in seconds.

use super::{DenseParameters, LayerLoad, Simulator, TokenRowsSpec, WeightPlacement, expected_ranks};

/// Bytes of a gradient element that [`WeightPlacement::Owned`] sums over copies, and that is averaged, whatever the parameter's type: f32.
const GRADIENT_BYTES: f64 = 4.0;

/// Seconds of averaging gradients.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Averages {
    /// Of one layer's shards over their replicas, behind each micro-batch's backward.
    pub shards: f64,
    /// Of all else in one layer, behind the last micro-batch's backward.
    pub dense: f64,
    /// After it: of the embeddings, whose gradients come last.
    pub after: f64,
}

/// Ranks that reduce together.
struct Ring {
    /// On each node.
    per_node: f64,
    nodes: f64,
}

impl Simulator {
    /// Seconds of one token All-to-All: it ends when the busiest port ends.
    pub(super) fn all_to_all_seconds(&self, load: &LayerLoad) -> f64 {
        let (model, ranks) = (&self.model, self.groups.ranks);
        let bytes = model.assignments() * model.token_bytes() * self.row_share();
        let within = load.intra_node * bytes / self.cluster.constants.intra_node_bytes_per_second;
        let between = load.inter_node * bytes / self.cluster.node_bytes_per_second();
        within.max(between) + (ranks - 1) as f64 * self.cluster.peer_latency_seconds
    }

    /// Rows that travel for each assignment.
    fn row_share(&self) -> f64 {
        match self.model.training.token_rows {
            TokenRowsSpec::ByAssignment => 1.0,
            TokenRowsSpec::ByRank => {
                expected_ranks(self.model.experts, self.model.topk, self.groups.ranks) / self.model.topk as f64
            }
        }
    }

    /// Seconds of the host and of small kernels in a layer and micro-batch that exchange takes, whatever its size.
    pub(super) fn exchange_overhead_seconds(&self) -> f64 {
        match self.model.training.token_rows {
            TokenRowsSpec::ByRank if self.groups.ranks > 1 => self.cluster.row_planning_seconds,
            _ => 0.0,
        }
    }

    /// Seconds of restoring a layer's weights and of resharding its gradients, both in elements of the model. Experts
    /// travel in All-to-Alls, attention in all-gathers and reduce-scatters, whose rings cross each node's ports once.
    pub(super) fn restore_seconds(&self) -> (f64, f64) {
        if self.model.weights == WeightPlacement::Owned {
            return (0.0, 0.0);
        }
        let (cluster, model) = (&self.cluster, &self.model);
        let (ranks, node) = (self.groups.ranks as f64, self.groups.ranks.min(cluster.ranks_per_node) as f64);
        let bytes = model.element_bytes as f64;
        let experts = model.slots(self.groups.ranks) as f64 * model.expert_parameters() * bytes;
        let intra = cluster.background_rate();
        let mut within = (experts * (node - 1.0) / ranks) / intra;
        let mut between = node * experts * (ranks - node) / ranks / cluster.node_bytes_per_second();
        if model.training.dense_parameters == DenseParameters::Sharded {
            let attention = model.attention_parameters() * bytes;
            let world = cluster.world_size() as f64;
            if cluster.nodes > 1 {
                between += attention * (world - 1.0) / world / cluster.node_bytes_per_second();
            } else {
                within += attention * (world - 1.0) / world / intra;
            }
        }
        let seconds = within.max(between) + (ranks - 1.0) * cluster.peer_latency_seconds;
        (seconds, seconds)
    }

    /// Seconds of one all-gather or reduce-scatter over the ranks that share a sequence.
    pub(super) fn tensor_collective_seconds(&self) -> f64 {
        let others = self.model.tensor_parallel as f64 - 1.0;
        let bytes = self.model.tokens() * others * self.model.token_bytes();
        bytes / self.cluster.constants.intra_node_bytes_per_second
    }

    /// Seconds of a reduce-scatter, or of an all-gather, of so many bytes on each rank, in the node first and then between nodes, where
    /// all ranks of a node share its ports.
    fn scatter_seconds(&self, bytes: f64, ring: &Ring) -> f64 {
        let cluster = &self.cluster;
        let within = bytes * (ring.per_node - 1.0) / ring.per_node / cluster.background_rate();
        let all = bytes / ring.per_node * cluster.ranks_per_node as f64;
        within + all * (ring.nodes - 1.0) / ring.nodes / cluster.node_bytes_per_second()
    }

    fn world(&self) -> Ring {
        Ring { per_node: self.cluster.ranks_per_node as f64, nodes: self.cluster.nodes as f64 }
    }

    /// The ranks that have the same shards.
    fn replicas(&self) -> Ring {
        let (ranks, node) = (self.groups.ranks, self.cluster.ranks_per_node);
        let per_node = (node / ranks).max(1);
        Ring { per_node: per_node as f64, nodes: (self.cluster.world_size() / ranks / per_node) as f64 }
    }

    /// Elements of a rank's shards of a layer.
    fn shards(&self) -> f64 {
        self.model.experts as f64 * self.model.expert_parameters() / self.groups.ranks as f64
    }

    /// Seconds of averaging gradients: of replicated parameters over all ranks, of shards over their replicas. All-reduced whole, also
    /// where the optimizer's state is cut.
    pub(super) fn average_seconds(&self) -> Averages {
        let model = &self.model;
        // A reduce-scatter and an all-gather.
        let all_reduce = |elements: f64, ring: &Ring| 2.0 * self.scatter_seconds(elements * GRADIENT_BYTES, ring);
        let shards = match model.weights {
            WeightPlacement::Sharded => all_reduce(self.shards(), &self.replicas()),
            // Summed by the update.
            WeightPlacement::Owned => 0.0,
        };
        if model.training.dense_parameters == DenseParameters::Sharded {
            return Averages { shards, ..Averages::default() };
        }
        let embedding = (model.vocabulary * model.hidden_size) as f64;
        let layer = (model.replicated_parameters() - embedding) / model.moe_layers() as f64;
        Averages { shards, dense: all_reduce(layer, &self.world()), after: all_reduce(embedding, &self.world()) }
    }

    /// Seconds of the update: the optimizer, and with ZeRO the all-gather of what each rank has updated, behind nothing. Owned experts:
    /// reduce-scatter of gradients behind the last micro-batch's backward pass and all-gather of weights behind the next forward pass;
    /// copies stand on different nodes where there are several.
    pub(super) fn update_seconds(&self, forward: f64, backward: f64) -> f64 {
        let (cluster, model) = (&self.cluster, &self.model);
        let ranks = cluster.world_size() as f64;
        let optimizer =
            |parameters: f64| parameters * model.optimizer_traffic_bytes() / cluster.memory_bytes_per_second;
        if model.weights == WeightPlacement::Sharded {
            let is_cut = model.training.dense_parameters == DenseParameters::Sharded;
            let dense = model.replicated_parameters() / if is_cut || self.groups.zero { ranks } else { 1.0 };
            let (shards, replicas) = (model.moe_layers() as f64 * self.shards(), ranks / self.groups.ranks as f64);
            if !self.groups.zero {
                return optimizer(dense + shards);
            }
            let width = model.training.parameter_bytes as f64;
            let gathered =
                if is_cut { 0.0 } else { self.scatter_seconds(model.replicated_parameters() * width, &self.world()) };
            return optimizer(dense + shards / replicas)
                + gathered
                + self.scatter_seconds(shards * width, &self.replicas());
        }
        let copies = ranks * model.slots(cluster.world_size()) as f64 / model.experts as f64;
        let own = model.layers as f64 * model.slots(cluster.world_size()) as f64 * model.expert_parameters();
        let bytes_per_second = if cluster.nodes > 1 {
            cluster.node_bytes_per_second() / cluster.ranks_per_node as f64
        } else {
            cluster.constants.intra_node_bytes_per_second
        };
        let seconds = |bytes: f64| own * bytes * (copies - 1.0) / copies / bytes_per_second;
        let gradients = (seconds(GRADIENT_BYTES) - backward).max(0.0);
        let weights = (seconds(model.element_bytes as f64) - forward).max(0.0);
        let updated = match model.training.dense_parameters {
            DenseParameters::Sharded => model.parameters() / ranks,
            DenseParameters::Replicated => model.replicated_parameters() + own,
        };
        optimizer(updated) + gradients + weights
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::{
        GroupSpec, ModelSpec, TrainingSpec,
        model::tests::{small_cluster, small_model},
    };

    /// Two nodes of four ranks at 100 GB/s within and 4 x 10 GB/s between nodes; 8 experts of 6.3 million parameters.
    fn simulator(ranks: usize, zero: bool) -> Simulator {
        let training = TrainingSpec { dense_parameters: DenseParameters::Replicated, ..TrainingSpec::default() };
        let model = ModelSpec { slots_per_rank: 0, training, ..small_model() };
        Simulator::new(small_cluster(), model).unwrap().with_groups(GroupSpec { ranks, zero }).unwrap()
    }

    const EXPERTS: f64 = 8.0 * 3.0 * 1024.0 * 2048.0;

    #[test]
    fn averages_by_hand() {
        // What is no expert, and no embedding: attention, router, output layer's third; on each rank.
        let dense = 2.0 * 1024.0 * 1280.0 + 1024.0 * 8.0 + 1000.0 * 1024.0 / 3.0;
        // Half of what a rank has over the other three of its node, then a node's whole over the link, once.
        let dense = 4.0 * dense * (0.75 / 1e11 + 0.5 / 4e10);
        let of = |ranks, zero| {
            let averages = simulator(ranks, zero).average_seconds();
            assert!((averages.dense / (2.0 * dense) - 1.0).abs() < 1e-9, "whatever the groups");
            averages.shards
        };
        assert_eq!(of(8, false), 0.0, "shards have no replicas");
        // Groups of a node: each rank's quarter of all experts goes to the other node, all four through the same ports.
        let experts = 4.0 * EXPERTS * 0.5 / 4e10;
        assert!((of(4, false) / (2.0 * experts) - 1.0).abs() < 1e-9);
        assert_eq!(of(4, true), of(4, false), "whole, also with ZeRO");
        // Groups of two: half of all experts, among two replicas in the node first.
        let within = 4.0 * EXPERTS / 2.0 * 0.5 / 1e11;
        assert!((of(2, false) / (2.0 * (experts + within)) - 1.0).abs() < 1e-9);
        let mut half = simulator(4, false);
        half.model.training.parameter_bytes = 2;
        assert_eq!(half.average_seconds(), simulator(4, false).average_seconds(), "in single precision always");
    }

    #[test]
    fn zero_updates_a_part_and_gathers_it() {
        let update = |ranks, zero| simulator(ranks, zero).update_seconds(0.0, 0.0);
        let model = simulator(4, true).model.clone();
        let (dense, shards) = (model.replicated_parameters(), 3.0 * EXPERTS / 4.0);
        let memory = 30.0 / 1e12;
        assert!((update(4, false) / ((dense + shards) * memory) - 1.0).abs() < 1e-9);
        let gathered = 4.0 * dense * (0.75 / 1e11 + 0.5 / 4e10) + 4.0 * shards * 4.0 * 0.5 / 4e10;
        let expected = (dense / 8.0 + shards / 2.0) * memory + gathered;
        assert!((update(4, true) / expected - 1.0).abs() < 1e-9);
    }

    #[test]
    fn groups_in_a_node_send_nothing_between_nodes_but_averages() {
        let step = |ranks| simulator(ranks, false).step_of_imbalance(1.0).unwrap();
        let mut slow = simulator(4, false);
        slow.cluster.constants.inter_node_bytes_per_second = 1.0;
        let slow = slow.step_of_imbalance(1.0).unwrap();
        assert_eq!((slow.all_to_all, slow.exposed_restore), (step(4).all_to_all, step(4).exposed_restore));
        assert!(slow.update > 1e3 * step(4).update);
        assert!(step(4).all_to_all < step(8).all_to_all);
        assert_eq!(step(1).all_to_all, 0.0);
    }

    #[test]
    fn rows_by_rank_are_fewer() {
        let mut by_rank = simulator(4, false);
        by_rank.model.training.token_rows = TokenRowsSpec::ByRank;
        let all_to_all = |simulator: &Simulator| simulator.step_of_imbalance(1.0).unwrap().all_to_all;
        let share = all_to_all(&by_rank) / all_to_all(&simulator(4, false));
        assert!((share - expected_ranks(8, 2, 4) / 2.0).abs() < 1e-9, "{share}");
    }
}
