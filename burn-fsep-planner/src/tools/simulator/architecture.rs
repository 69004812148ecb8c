use serde::{Deserialize, Serialize};

use super::{SimulatorError, cluster::at_least_one};

/// What tells a model from a decoder of which every layer has plain attention and experts. All fields have defaults.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArchitectureSpec {
    /// Width of a head; `D` over the heads if 0.
    pub head_size: usize,
    /// Whole queries and keys are normalised (OLMoE), or their heads (Qwen3).
    pub query_key_norm: bool,
    /// The output layer is the embedding.
    pub tied_embeddings: bool,
    /// Intermediate size of a shared expert; 0 without.
    pub shared_intermediate_size: usize,
    /// How many of the layers have a dense network in place of experts.
    pub dense_layers: usize,
    /// Its intermediate size.
    pub dense_intermediate_size: usize,
    /// How often attention's forward pass reads or writes rows of `D` elements beside what [`ClusterSpec::attention_passes`] counts:
    /// rotation and normalisation of queries and keys that are no kernels of their own.
    ///
    /// [`ClusterSpec::attention_passes`]: super::ClusterSpec::attention_passes
    pub extra_attention_passes: f64,
    /// Sizes of attention that is no plain one.
    pub attention: Option<AttentionSpec>,
}

/// Attention that heads and sizes do not describe, such as DeepSeek's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionSpec {
    /// Parameters of a layer.
    pub parameters: usize,
    /// Width of all heads' queries, and so of their keys.
    pub query_key_width: usize,
    /// Width of all heads' values.
    pub value_width: usize,
    /// Elements a token that it keeps for backward, input and residuals left out.
    pub kept_elements: usize,
}

impl ArchitectureSpec {
    pub(super) fn check(&self, layers: usize) -> Result<(), SimulatorError> {
        if !(0.0..=1e6).contains(&self.extra_attention_passes) {
            let value = self.extra_attention_passes;
            return Err(SimulatorError::setting("extra_attention_passes", value, "a number from 0"));
        }
        if self.dense_layers >= layers {
            let expected = format!("less than layers = {layers}");
            return Err(SimulatorError::setting("dense_layers", self.dense_layers, expected));
        }
        let mut sizes = vec![
            ("head_size", self.head_size.max(1)),
            ("shared_intermediate_size", self.shared_intermediate_size.max(1)),
            ("dense_intermediate_size", self.dense_intermediate_size.max(usize::from(self.dense_layers == 0))),
        ];
        if let Some(AttentionSpec { parameters, query_key_width, value_width, kept_elements }) = self.attention {
            sizes.extend([
                ("parameters", parameters),
                ("query_key_width", query_key_width),
                ("value_width", value_width),
                ("kept_elements", kept_elements),
            ]);
        }
        sizes.into_iter().try_for_each(|(field, value)| at_least_one(field, value))
    }
}
