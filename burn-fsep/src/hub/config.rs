use std::path::Path;

use burn::tensor::FloatDType;

use super::{
    Family, HubError, MoeFacts, RopeConfig, RopeScaling,
    folder::CONFIG,
    json::{Object, read_object},
    keys::Keys,
};

/// What `config.json` says of a model, under one name for all families and versions of transformers. Keys that are not there have
/// the defaults of transformers 5.24, but for sizes, which have to be there.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The family.
    pub family: Family,
    /// Hidden size `D`.
    pub hidden_size: usize,
    /// Intermediate size of the layers that have no experts.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Heads of queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values.
    pub num_key_value_heads: usize,
    /// Dimensions of a head; of DeepSeek those that are rotated, see [`MlaConfig`].
    pub head_dim: usize,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// The nonlinearity of all MLPs' gates.
    pub hidden_act: HiddenAct,
    /// Epsilon of all RMS norms.
    pub rms_norm_eps: f64,
    /// Rotary position embeddings.
    pub rope: RopeConfig,
    /// Tokens that a layer of the type [`LayerType::SlidingAttention`] looks back on, itself among them.
    pub sliding_window: Option<usize>,
    /// What each layer attends to.
    pub layer_types: Vec<LayerType>,
    /// Whether the projections to queries, keys and values have biases (of DeepSeek those to the low ranks).
    pub attention_bias: bool,
    /// Whether attention's output projection has a bias.
    pub attention_output_bias: bool,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether each head has a logit that takes attention away from all tokens (GPT-OSS, `self_attn.sinks`).
    pub attention_sinks: bool,
    /// Queries, keys and values are clipped to this (OLMoE).
    pub clip_qkv: Option<f64>,
    /// Multi-head latent attention (DeepSeek).
    pub mla: Option<MlaConfig>,
    /// Whether the head's weight is that of the embeddings.
    pub tie_word_embeddings: bool,
    /// Experts and routers.
    pub moe: MoeFacts,
    /// Whether each layer has experts.
    pub sparse_layers: Vec<bool>,
    /// Type of the parameters.
    pub dtype: Option<FloatDType>,
    /// The token that a text begins with.
    pub bos_token_id: Option<usize>,
    /// The tokens that a text ends with.
    pub eos_token_ids: Vec<usize>,
    /// The token that fills up batches.
    pub pad_token_id: Option<usize>,
    /// How the weights in the folder are quantised.
    pub quantization: Option<Quantization>,
}

/// A nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HiddenAct {
    /// `x * sigmoid(x)`.
    Silu,
    /// The exact GELU.
    Gelu,
}

/// What a layer attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerType {
    /// All tokens before.
    FullAttention,
    /// The last tokens before.
    SlidingAttention,
}

/// RMS norms of queries and keys, before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Of each head by itself (Qwen3): weights `[head_dim]`.
    PerHead,
    /// Of all heads together (OLMoE): weights `[heads * head_dim]`.
    AllHeads,
}

/// Sizes of multi-head latent attention (DeepSeek-V2, section 2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MlaConfig {
    /// Rank of the queries; `None`: one projection `q_proj`.
    pub q_lora_rank: Option<usize>,
    /// Rank of keys and values.
    pub kv_lora_rank: usize,
    /// Dimensions of a head that are not rotated.
    pub qk_nope_head_dim: usize,
    /// Dimensions of a head that are.
    pub qk_rope_head_dim: usize,
    /// Dimensions of a head's values.
    pub v_head_dim: usize,
    /// Whether neighbours are rotated with each other, and not the first half with the second.
    pub rope_interleave: bool,
}

/// How a folder's weights are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantization {
    /// 4-bit values, 32 with one exponent (GPT-OSS).
    Mxfp4,
    /// 8-bit values (DeepSeek-V3).
    Fp8 {
        /// Rows and columns with one scale; `None`: a matrix has one.
        block: Option<[usize; 2]>,
    },
}

/// Far more layers than any model has: a list of them is made before anything can be compared with the files.
const MAX_LAYERS: usize = 1 << 16;
/// The largest `config.json`.
const MAX_CONFIG: u64 = 16 << 20;

impl ModelConfig {
    /// What the `config.json` of a folder says; nothing else has to be in it.
    ///
    /// # Errors
    ///
    /// [`HubError::UnknownFamily`], [`HubError::Config`], [`HubError::Damaged`], [`HubError::Io`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, HubError> {
        Self::open_with_json(folder.as_ref()).map(|(config, _)| config)
    }

    /// The same, and the file's content.
    ///
    /// # Errors
    ///
    /// As [`ModelConfig::open`].
    pub(super) fn open_with_json(folder: &Path) -> Result<(Self, Object), HubError> {
        let file = folder.join(CONFIG);
        let object = read_object(&file, MAX_CONFIG)?;
        Ok((Self::read(&file, &object)?, object))
    }

    /// # Errors
    ///
    /// [`HubError::UnknownFamily`], [`HubError::Config`].
    fn read(file: &Path, object: &Object) -> Result<Self, HubError> {
        let keys = Keys { file, object, prefix: "" };
        let found = keys.find_str("model_type")?.ok_or_else(|| keys.error("model_type", "is missing"))?;
        let family = Family::from_model_type(found).ok_or_else(|| HubError::UnknownFamily {
            file: file.to_path_buf(),
            found: found.into(),
            known: Family::ALL.map(Family::model_type).join(", "),
        })?;
        let hidden_size = keys.size("hidden_size")?;
        let num_hidden_layers = keys.size("num_hidden_layers")?;
        if num_hidden_layers > MAX_LAYERS {
            return Err(keys.error("num_hidden_layers", format!("is {num_hidden_layers}, more than {MAX_LAYERS}")));
        }
        let rms_norm_eps = keys.f64_or("rms_norm_eps", rms_norm_eps(family))?;
        if !(rms_norm_eps.is_finite() && rms_norm_eps > 0.0) {
            return Err(keys.error("rms_norm_eps", format!("is {rms_norm_eps}, not positive")));
        }
        let num_attention_heads = keys.size("num_attention_heads")?;
        let mla = if family.is_deepseek() { Some(MlaConfig::read(keys, family)?) } else { None };
        let head_dim = match (mla, keys.find_usize("head_dim")?) {
            (Some(mla), _) => mla.qk_rope_head_dim,
            (None, Some(head_dim)) => head_dim,
            (None, None) if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            (None, None) => return Err(keys.error("num_attention_heads", format!("does not divide {hidden_size}"))),
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(keys.error("head_dim", format!("is {head_dim}: it has to be even and more than 0")));
        }
        let num_key_value_heads = match keys.has("num_key_value_heads") {
            true => keys.size("num_key_value_heads")?,
            false => num_attention_heads,
        };
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(keys.error("num_key_value_heads", format!("does not divide {num_attention_heads}")));
        }
        let moe = MoeFacts::read(keys, family)?;
        let (sliding_window, layer_types) = attention(keys, family, num_hidden_layers)?;
        let default_bias = family == Family::GptOss;
        let attention_bias = match family {
            Family::Mixtral => false,
            Family::Qwen2Moe => keys.bool_or("qkv_bias", true)?,
            _ => keys.bool_or("attention_bias", default_bias)?,
        };
        let (default_theta, if_no_rope) = match family {
            Family::Mixtral => (1e6, RopeScaling::Default),
            Family::GptOss => (150_000.0, gpt_oss_rope()),
            _ => (10_000.0, RopeScaling::Default),
        };
        let one_or_none = |key| Ok::<_, HubError>(keys.usizes(key)?.first().copied());
        Ok(Self {
            family,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers,
            vocab_size: keys.size("vocab_size")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            hidden_act: HiddenAct::read(keys)?,
            rms_norm_eps,
            rope: RopeConfig::read(keys, default_theta, if_no_rope)?,
            sliding_window,
            layer_types,
            attention_bias,
            attention_output_bias: attention_bias && family != Family::Qwen2Moe,
            qk_norm: match family {
                Family::Qwen3Moe => QkNorm::PerHead,
                Family::Olmoe => QkNorm::AllHeads,
                _ => QkNorm::None,
            },
            attention_sinks: family == Family::GptOss,
            clip_qkv: if family == Family::Olmoe { keys.find_f64("clip_qkv")? } else { None },
            mla,
            tie_word_embeddings: keys.bool_or("tie_word_embeddings", false)?,
            sparse_layers: moe.sparse_layers(keys, family, num_hidden_layers)?,
            moe,
            dtype: dtype(keys)?,
            bos_token_id: one_or_none("bos_token_id")?,
            eos_token_ids: keys.usizes("eos_token_id")?,
            pad_token_id: one_or_none("pad_token_id")?,
            quantization: Quantization::read(keys)?,
        })
    }
}

/// The window, and the layers that have it.
fn attention(keys: Keys<'_>, family: Family, layers: usize) -> Result<(Option<usize>, Vec<LayerType>), HubError> {
    use LayerType::{FullAttention, SlidingAttention};

    let default = match family {
        Family::GptOss => Some(128),
        // Of a key that is not there; null is none.
        _ if family.is_qwen() && !keys.object.contains_key("sliding_window") => Some(4096),
        _ => None,
    };
    let uses_window = !family.is_qwen() || keys.bool_or("use_sliding_window", false)?;
    let has_window =
        uses_window && matches!(family, Family::Mixtral | Family::GptOss | Family::Qwen2Moe | Family::Qwen3Moe);
    let window =
        if has_window { keys.find_usize("sliding_window")?.or(default).filter(|&window| window > 0) } else { None };
    let listed = match family {
        Family::GptOss | Family::Qwen2Moe => keys.find_strs("layer_types")?,
        _ => None,
    };
    let types: Vec<LayerType> = if let Some(names) = listed {
        if names.len() != layers {
            return Err(keys.error("layer_types", format!("has {} entries for {layers} layers", names.len())));
        }
        let known = |name: &str| match name {
            "full_attention" => Ok(FullAttention),
            "sliding_attention" => Ok(SlidingAttention),
            other => Err(keys.error("layer_types", format!("has the unknown type `{other}`"))),
        };
        names.into_iter().map(known).collect::<Result<_, _>>()?
    } else {
        let max_window_layers = keys.find_usize("max_window_layers")?.unwrap_or(28);
        let is_sliding = |layer: usize| match family {
            Family::GptOss => layer.is_multiple_of(2),
            Family::Qwen2Moe => layer.is_multiple_of(2) && layer < max_window_layers,
            _ => true,
        };
        let of = |layer| if window.is_some() && is_sliding(layer) { SlidingAttention } else { FullAttention };
        (0..layers).map(of).collect()
    };
    if window.is_none() && types.contains(&SlidingAttention) {
        return Err(keys.error("sliding_window", "is missing, but some layers have one"));
    }
    Ok((window, types))
}

fn rms_norm_eps(family: Family) -> f64 {
    match family {
        Family::Mixtral | Family::Olmoe | Family::GptOss => 1e-5,
        _ => 1e-6,
    }
}

/// What GPT-OSS has where its configuration says nothing.
fn gpt_oss_rope() -> RopeScaling {
    RopeScaling::Yarn {
        factor: 32.0,
        original_max_position_embeddings: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: false,
    }
}

/// `dtype`, before transformers 5 `torch_dtype`.
fn dtype(keys: Keys<'_>) -> Result<Option<FloatDType>, HubError> {
    let key = if keys.has("dtype") { "dtype" } else { "torch_dtype" };
    keys.find_str(key)?
        .map(|name| match name.trim_start_matches("torch.") {
            "float64" => Ok(FloatDType::F64),
            "float32" | "float" => Ok(FloatDType::F32),
            "bfloat16" => Ok(FloatDType::BF16),
            "float16" | "half" => Ok(FloatDType::F16),
            other => Err(keys.error(key, format!("is `{other}`; known are float32, bfloat16, float16 and float64"))),
        })
        .transpose()
}

impl HiddenAct {
    fn read(keys: Keys<'_>) -> Result<Self, HubError> {
        match keys.find_str("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => Ok(Self::Silu),
            "gelu" => Ok(Self::Gelu),
            other => Err(keys.error("hidden_act", format!("is `{other}`; known are silu and gelu"))),
        }
    }
}

impl MlaConfig {
    fn read(keys: Keys<'_>, family: Family) -> Result<Self, HubError> {
        Ok(Self {
            q_lora_rank: keys.find_usize("q_lora_rank")?,
            kv_lora_rank: keys.size("kv_lora_rank")?,
            qk_nope_head_dim: keys.size("qk_nope_head_dim")?,
            qk_rope_head_dim: keys.size("qk_rope_head_dim")?,
            v_head_dim: keys.size("v_head_dim")?,
            rope_interleave: family == Family::DeepseekV2 || keys.bool_or("rope_interleave", true)?,
        })
    }
}

impl Quantization {
    fn read(keys: Keys<'_>) -> Result<Option<Self>, HubError> {
        let Some(found) = keys.find_object("quantization_config", "quantization_config.")? else { return Ok(None) };
        match found.find_str("quant_method")? {
            Some("mxfp4") => Ok(Some(Self::Mxfp4)),
            Some("fp8") => {
                let format = found.find_str("fmt")?.unwrap_or("e4m3");
                if !["e4m3", "float8_e4m3fn"].contains(&format) {
                    return Err(found.error("fmt", format!("is `{format}`; e4m3 is known")));
                }
                let block = match found.usizes("weight_block_size")?[..] {
                    [] => None,
                    [rows, columns] if rows > 0 && columns > 0 => Some([rows, columns]),
                    _ => return Err(found.error("weight_block_size", "is not two sizes")),
                };
                Ok(Some(Self::Fp8 { block }))
            }
            Some(other) => {
                let reason =
                    format!("is `{other}`; mxfp4 and fp8 are decoded while reading: save the model unquantised");
                Err(found.error("quant_method", reason))
            }
            None => Err(found.error("quant_method", "is missing")),
        }
    }
}
