use std::fmt;

/// A family of Mixture-of-Experts models: `model_type` of transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// `mixtral`
    Mixtral,
    /// `qwen2_moe`
    Qwen2Moe,
    /// `qwen3_moe`
    Qwen3Moe,
    /// `olmoe`
    Olmoe,
    /// `deepseek_v2`
    DeepseekV2,
    /// `deepseek_v3`
    DeepseekV3,
    /// `gpt_oss`
    GptOss,
}

impl Family {
    /// All that are known.
    pub const ALL: [Self; 7] =
        [Self::Mixtral, Self::Qwen2Moe, Self::Qwen3Moe, Self::Olmoe, Self::DeepseekV2, Self::DeepseekV3, Self::GptOss];

    /// `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Mixtral => "mixtral",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Olmoe => "olmoe",
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
            Self::GptOss => "gpt_oss",
        }
    }

    /// The family of a `model_type`.
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.model_type() == model_type)
    }

    pub(super) fn is_deepseek(self) -> bool {
        matches!(self, Self::DeepseekV2 | Self::DeepseekV3)
    }

    pub(super) fn is_qwen(self) -> bool {
        matches!(self, Self::Qwen2Moe | Self::Qwen3Moe)
    }

    /// The names that an MoE block may have in files: the hub's first, then that of transformers in memory.
    pub(super) fn block_names(self) -> &'static [&'static str] {
        if self == Self::Mixtral { &["block_sparse_moe", "mlp"] } else { &["mlp"] }
    }

    /// The router's name in the block.
    pub(super) fn router(self) -> &'static str {
        if self == Self::GptOss { "router" } else { "gate" }
    }

    /// The shared expert's name in the block.
    pub(super) fn shared_expert(self) -> &'static str {
        if self.is_deepseek() { "shared_experts" } else { "shared_expert" }
    }

    /// Names of an expert's gate, up and down.
    pub(super) fn projections(self) -> [&'static str; 3] {
        if self == Self::Mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}
