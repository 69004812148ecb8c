//! What a model's sizes add up to.

use super::{ArchitectureSpec, AttentionSpec, DenseParameters, ModelSpec};
use crate::memory::{ActivationSizes, MemoryModel, MoeSizes, OptimizerState, TrainingSizes};

/// Tensors as wide as a dense network that Burn's own operations keep of it: gate, its sigmoid, their product, up, and what goes
/// down.
const DENSE_KEPT: usize = 5;

impl ModelSpec {
    /// Sizes of a layer's attention.
    fn attention(&self) -> AttentionSpec {
        let of_heads = || {
            let head = match self.architecture.head_size {
                0 => self.hidden_size as f64 / self.attention_heads as f64,
                size => size as f64,
            };
            let width = |heads: usize| (heads as f64 * head).round() as usize;
            let (query, key) = (width(self.attention_heads), width(self.key_value_heads));
            AttentionSpec {
                parameters: (2 * self.hidden_size).saturating_mul(query + key),
                query_key_width: query,
                value_width: query,
                // Queries, rotated queries and what comes out; keys, rotated keys and values; before they were normalised.
                kept_elements: 3 * (query + key) + if self.architecture.query_key_norm { query + key } else { 0 },
            }
        };
        self.architecture.attention.unwrap_or_else(of_heads)
    }

    /// Parameters of a layer's attention: queries and output `D * D` each where heads are as wide as that, keys and values narrower.
    pub fn attention_parameters(&self) -> f64 {
        self.attention().parameters as f64
    }

    /// Parameters that all layers have besides attention and experts: router, shared expert, dense networks.
    fn other_parameters(&self) -> f64 {
        let (hidden, sizes) = (self.hidden_size as f64, &self.architecture);
        let sparse = hidden * self.experts as f64 + 3.0 * hidden * sizes.shared_intermediate_size as f64;
        let dense = 3.0 * hidden * sizes.dense_intermediate_size as f64;
        self.moe_layers() as f64 * sparse + sizes.dense_layers as f64 * dense
    }

    /// Parameters of all that is no expert; normalisations are left out.
    pub fn replicated_parameters(&self) -> f64 {
        let embeddings = if self.architecture.tied_embeddings { 1.0 } else { 2.0 };
        let embeddings = embeddings * self.vocabulary as f64 * self.hidden_size as f64;
        self.layers as f64 * self.attention_parameters() + self.other_parameters() + embeddings
    }

    /// Forward FLOP of a rank in a micro-batch and the mean layer, outside of routed experts: attention's projections, its scores and
    /// values over half of all pairs (causal), shared experts and dense networks.
    pub fn attention_flops(&self) -> f64 {
        let others = if self.architecture == ArchitectureSpec::default() {
            // Of plain decoders routers were never counted.
            0.0
        } else {
            2.0 * self.other_parameters() / self.layers as f64
        };
        self.tokens() * (2.0 * self.attention_parameters() + others) + self.attention_score_flops()
    }

    /// Of these, attention's scores and values.
    pub fn attention_score_flops(&self) -> f64 {
        let attention = self.attention();
        self.tokens() * self.sequence_length as f64 * (attention.query_key_width + attention.value_width) as f64
    }

    /// FLOP of a token in a training step, forward and backward without recomputation, as shares of a peak count it: products with
    /// the parameters that it meets, embeddings left out, and attention.
    pub fn training_flops_per_token(&self) -> f64 {
        let embedding = (self.vocabulary * self.hidden_size) as f64;
        6.0 * (self.active_parameters() - embedding)
            + 3.0 * self.layers as f64 * self.attention_score_flops() / self.tokens()
    }

    /// The model as [`memory`](crate::memory) takes it, in groups of `M` ranks.
    pub fn memory_model(&self, group_ranks: usize) -> MemoryModel {
        let (sizes, attention) = (&self.architecture, self.attention());
        // Inputs of both halves of a layer, plain and normalised.
        let of_layer = 4 * self.hidden_size + attention.kept_elements;
        let networks =
            self.moe_layers() * sizes.shared_intermediate_size + sizes.dense_layers * sizes.dense_intermediate_size;
        let elements = of_layer + (DENSE_KEPT * networks).div_ceil(self.layers);
        MemoryModel {
            replicated_parameters: self.replicated_parameters() as u64,
            moe: self.moe_sizes(group_ranks),
            activations: ActivationSizes {
                layers: self.layers as u64,
                elements_per_token: elements as u64,
                f32_elements_per_token: self.attention_heads as u64,
                vocabulary: self.vocabulary as u64,
            },
        }
    }

    /// The MoE layers' sizes in groups of `M` ranks.
    pub fn moe_sizes(&self, group_ranks: usize) -> MoeSizes {
        MoeSizes {
            layers: self.moe_layers() as u64,
            experts: self.experts as u64,
            expert_parameters: 3 * self.hidden_size as u64 * self.intermediate_size as u64,
            hidden_size: self.hidden_size as u64,
            intermediate_size: self.intermediate_size as u64,
            gated: true,
            topk: self.topk as u64,
            slots_per_rank: self.slots(group_ranks) as u64,
        }
    }

    /// Parameters of the whole model.
    pub fn parameters(&self) -> f64 {
        self.replicated_parameters() + self.moe_layers() as f64 * self.experts as f64 * self.expert_parameters()
    }

    /// Parameters that a token's computation takes.
    pub fn active_parameters(&self) -> f64 {
        self.replicated_parameters() + self.moe_layers() as f64 * self.topk as f64 * self.expert_parameters()
    }

    /// The training as [`memory`](crate::memory) takes it. `max_over_mean`: the most loaded rank's load over the mean.
    pub fn training_sizes(&self, max_over_mean: f64) -> TrainingSizes {
        let training = &self.training;
        TrainingSizes {
            tokens: self.tokens() as u64,
            micro_batches: self.micro_batches as u64,
            max_over_mean,
            parameter_bytes: training.parameter_bytes as u64,
            compute_bytes: self.element_bytes as u64,
            optimizer: OptimizerState {
                tensors: training.optimizer_tensors as u64,
                element_bytes: training.optimizer_bytes as u64,
                master_bytes: training.master_bytes as u64,
            },
            recompute: self.recompute,
            kept_layers: training.kept_layers as u64,
            prefetch: true,
            cut_dense_parameters: training.dense_parameters == DenseParameters::Sharded,
        }
    }

    /// Bytes that the optimizer reads and writes for a parameter: the gradient read, parameter, state and master weight read and
    /// written, and in mixed precision the copy that computes written.
    pub fn optimizer_traffic_bytes(&self) -> f64 {
        let training = &self.training;
        let copy = if training.parameter_bytes == self.element_bytes { 0 } else { self.element_bytes };
        let state = training.optimizer_tensors * training.optimizer_bytes + training.master_bytes;
        (3 * training.parameter_bytes + 2 * state + copy) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::{RankMemory, RankSplit},
        tools::simulator::model::tests::small_model,
    };

    /// Without normalisations, which the simulator leaves out, as moe-hf's `inspect` counts them.
    #[test]
    fn known_models_have_their_sizes() {
        let json = |name: &str| -> ModelSpec {
            let path = format!("{}/../examples/simulate/{name}.json", env!("CARGO_MANIFEST_DIR"));
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
        };
        for (name, billions, active) in
            [("olmoe-1b-7b", 6.919, 1.282), ("mixtral-8x7b", 46.70, 12.88), ("deepseek-v3", 671.0, 37.6)]
        {
            let model = json(name);
            assert!((model.parameters() / 1e9 / billions - 1.0).abs() < 0.001, "{name}: {}", model.parameters());
            assert!(
                (model.active_parameters() / 1e9 / active - 1.0).abs() < 0.005,
                "{name}: {}",
                model.active_parameters()
            );
        }
    }

    #[test]
    fn absurd_sizes_are_errors() {
        let largest = 1 << 30;
        for model in [
            ModelSpec {
                attention_heads: largest,
                key_value_heads: largest,
                hidden_size: largest,
                architecture: ArchitectureSpec { head_size: largest, ..ArchitectureSpec::default() },
                ..small_model()
            },
            ModelSpec { hidden_size: largest, intermediate_size: largest, ..small_model() },
            ModelSpec { sequence_length: largest, topk: 8, layers: 9999, ..small_model() },
            ModelSpec { vocabulary: largest, hidden_size: largest, ..small_model() },
        ] {
            let training = model.training_sizes(1e6);
            assert!(RankMemory::of(&model.memory_model(8), &training, RankSplit::single()).is_err(), "{model:?}");
            assert!(model.attention_flops().is_finite() && model.training_flops_per_token().is_finite());
        }
    }
}
