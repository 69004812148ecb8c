use serde::{Deserialize, Serialize};

use super::{ArchitectureSpec, ClusterSpec, SimulatorError, TrainingSpec, cluster::at_least_one, training};
use crate::{Layout, memory::Recompute};

/// Layers are simulated one by one: more than any model has.
const MAX_LAYERS: usize = 10_000;

/// Where expert weights live between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightPlacement {
    /// Every rank holds a shard of every expert; each layer restores whole experts and reshards gradients (FSEP).
    #[default]
    Sharded,
    /// Every rank holds its experts whole; gradients are summed over the copies once a step (Megatron).
    Owned,
}

/// A Mixture-of-Experts transformer with SwiGLU experts, and the batch it trains on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Transformer layers, each with one MoE layer.
    pub layers: usize,
    /// Hidden size `D`.
    pub hidden_size: usize,
    /// Intermediate size `F` of an expert.
    pub intermediate_size: usize,
    /// Experts `E`.
    pub experts: usize,
    /// Experts per token `K`.
    pub topk: usize,
    /// Slots a rank `C`; 0 for as many as the experts need in a group, and one more.
    pub slots_per_rank: usize,
    /// Attention heads.
    pub attention_heads: usize,
    /// Key and value heads (grouped-query attention).
    pub key_value_heads: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Bytes of a weight or an activation: 2 for bf16.
    pub element_bytes: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// Sequences of a step, divided by the world size.
    pub sequences_per_rank: usize,
    /// Micro-batches of a step: gradient accumulation.
    pub micro_batches: usize,
    /// What of the forward pass is computed again in backward: in JSON `false`, `true` for whole layers, or `"experts"`.
    #[serde(with = "training::recompute")]
    pub recompute: Recompute,
    /// Where expert weights live.
    #[serde(default)]
    pub weights: WeightPlacement,
    /// Ranks that share the attention of one sequence, with sequence parallelism; 1 is none.
    #[serde(default = "one")]
    pub tensor_parallel: usize,
    /// What tells a model from a plain decoder.
    #[serde(default)]
    pub architecture: ArchitectureSpec,
    /// How it is trained.
    #[serde(default)]
    pub training: TrainingSpec,
}

fn one() -> usize {
    1
}

impl ModelSpec {
    /// Checks that all settings make sense on a cluster.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] naming the first that does not.
    pub fn check(&self, cluster: &ClusterSpec) -> Result<(), SimulatorError> {
        for (field, value) in [
            ("layers", self.layers),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("experts", self.experts),
            ("topk", self.topk),
            ("attention_heads", self.attention_heads),
            ("key_value_heads", self.key_value_heads),
            ("vocabulary", self.vocabulary),
            ("element_bytes", self.element_bytes),
            ("sequence_length", self.sequence_length),
            ("sequences_per_rank", self.sequences_per_rank),
            ("micro_batches", self.micro_batches),
            ("tensor_parallel", self.tensor_parallel),
        ] {
            at_least_one(field, value)?;
        }
        if self.layers > MAX_LAYERS {
            return Err(SimulatorError::setting("layers", self.layers, format!("at most {MAX_LAYERS}")));
        }
        if self.topk > self.experts {
            return Err(SimulatorError::setting("topk", self.topk, format!("at most experts = {}", self.experts)));
        }
        if self.key_value_heads > self.attention_heads {
            let expected = format!("at most attention_heads = {}", self.attention_heads);
            return Err(SimulatorError::setting("key_value_heads", self.key_value_heads, expected));
        }
        self.check_slots(cluster.world_size())?;
        if self.tensor_parallel > cluster.ranks_per_node || !cluster.ranks_per_node.is_multiple_of(self.tensor_parallel)
        {
            let expected = format!("a divisor of ranks_per_node = {}", cluster.ranks_per_node);
            return Err(SimulatorError::setting("tensor_parallel", self.tensor_parallel, expected));
        }
        self.architecture.check(self.layers)?;
        self.training.check()?;
        let tokens = self.sequences_per_rank * self.sequence_length;
        if !tokens.is_multiple_of(self.micro_batches) {
            let expected = format!("a divisor of the {tokens} tokens that a rank has in a step");
            return Err(SimulatorError::setting("micro_batches", self.micro_batches, expected));
        }
        Ok(())
    }

    /// Tokens of a rank in a micro-batch `T`.
    pub fn tokens(&self) -> f64 {
        (self.sequences_per_rank * self.sequence_length) as f64 / self.micro_batches as f64
    }

    /// Mean assignments of a rank in a micro-batch `T * K`.
    pub fn assignments(&self) -> f64 {
        self.tokens() * self.topk as f64
    }

    /// Parameters of one expert `P = 3 * D * F`.
    pub fn expert_parameters(&self) -> f64 {
        3.0 * self.hidden_size as f64 * self.intermediate_size as f64
    }

    /// Layers with experts.
    pub fn moe_layers(&self) -> usize {
        self.layers - self.architecture.dense_layers
    }

    /// Slots a rank in groups of `M` ranks: as the file says, or burn-fsep's default.
    pub fn slots(&self, group_ranks: usize) -> usize {
        match self.slots_per_rank {
            0 => (self.experts.div_ceil(group_ranks.max(1)) + 1).min(self.experts),
            slots => slots,
        }
    }

    /// Checks that groups of `M` ranks hold every expert.
    pub(super) fn check_slots(&self, group_ranks: usize) -> Result<(), SimulatorError> {
        let slots = self.slots(group_ranks);
        Layout::check_shape(group_ranks, slots, self.experts)
            .map_err(|error| SimulatorError::setting("slots_per_rank", slots, error.to_string()))
    }

    /// Forward FLOP of one assignment in an expert: `6 * D * F`.
    pub fn expert_flops(&self) -> f64 {
        2.0 * self.expert_parameters()
    }

    /// Bytes of one assignment's intermediate activations: `F` elements.
    pub fn intermediate_bytes(&self) -> f64 {
        (self.intermediate_size * self.element_bytes) as f64
    }

    /// Forward FLOP of a rank's output layer in a micro-batch.
    pub fn head_flops(&self) -> f64 {
        2.0 * self.tokens() * self.hidden_size as f64 * self.vocabulary as f64
    }

    /// Bytes of one token's hidden state.
    pub fn token_bytes(&self) -> f64 {
        (self.hidden_size * self.element_bytes) as f64
    }
}

#[cfg(test)]
pub(in crate::tools::simulator) mod tests {
    use super::*;
    use crate::tools::simulator::MeasuredConstants;

    pub(in crate::tools::simulator) fn small_cluster() -> ClusterSpec {
        ClusterSpec {
            nodes: 2,
            ranks_per_node: 4,
            constants: MeasuredConstants {
                seconds_per_assignment: 1e-6,
                bytes_per_token: 2048.0,
                intra_node_bytes_per_second: 1e11,
                inter_node_bytes_per_second: 1e10,
                hidden_size: 1024,
                intermediate_size: 2048,
            },
            inter_node_ports: 4,
            memory_bytes_per_second: 1e12,
            elementwise_passes: 0.0,
            layer_overhead_seconds: 0.0,
            straggler_factor: 1.0,
            row_passes: 0.0,
            weight_passes: 0.0,
            attention_passes: 0.0,
            attention_flops_per_second: 0.0,
            background_bytes_per_second: 0.0,
            background_slowdown: 0.0,
            peer_latency_seconds: 0.0,
            row_planning_seconds: 0.0,
            peak_flops_per_second: 0.0,
            memory_bytes_per_rank: 0.0,
            usable_memory_share: 0.9,
        }
    }

    pub(in crate::tools::simulator) fn small_model() -> ModelSpec {
        ModelSpec {
            layers: 3,
            hidden_size: 1024,
            intermediate_size: 2048,
            experts: 8,
            topk: 2,
            slots_per_rank: 2,
            attention_heads: 16,
            key_value_heads: 4,
            vocabulary: 1000,
            element_bytes: 2,
            sequence_length: 1024,
            sequences_per_rank: 4,
            micro_batches: 2,
            recompute: Recompute::None,
            weights: WeightPlacement::Sharded,
            tensor_parallel: 1,
            architecture: ArchitectureSpec::default(),
            training: TrainingSpec::default(),
        }
    }

    #[test]
    fn the_papers_models_have_the_published_sizes() {
        let mixtral = ModelSpec {
            layers: 32,
            hidden_size: 4096,
            intermediate_size: 14336,
            attention_heads: 32,
            key_value_heads: 8,
            vocabulary: 32000,
            ..small_model()
        };
        assert!((mixtral.parameters() / 46.70e9 - 1.0).abs() < 0.001, "{}", mixtral.parameters());
        assert_eq!(mixtral.expert_flops(), 6.0 * 4096.0 * 14336.0);
    }

    #[test]
    fn bad_settings_are_named() {
        small_model().check(&small_cluster()).unwrap();
        let bad = |change: fn(&mut ModelSpec)| {
            let mut model = small_model();
            change(&mut model);
            model.check(&small_cluster()).unwrap_err().field().unwrap()
        };
        assert_eq!(bad(|m| m.layers = 0), "layers");
        assert_eq!(bad(|m| m.hidden_size = usize::MAX), "hidden_size");
        assert_eq!(bad(|m| m.topk = 9), "topk");
        assert_eq!(bad(|m| m.slots_per_rank = 9), "slots_per_rank");
        assert_eq!(bad(|m| m.key_value_heads = 17), "key_value_heads");
        assert_eq!(bad(|m| m.tensor_parallel = 3), "tensor_parallel");
        assert_eq!(bad(|m| m.micro_batches = 3), "micro_batches");
    }
}
