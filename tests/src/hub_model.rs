use burn::{
    module::{Module, ModuleVisitor, Param},
    nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig},
    tensor::{Device, Tensor, TensorData},
};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    hub::{ModelConfig, QkNorm},
};

/// The parameters of a decoder of any family under the names of transformers' modules, without the attention's computation.
#[derive(Module, Debug)]
pub struct HubModel {
    /// The decoder.
    pub model: HubDecoder,
    /// `D -> V`, if its weight is not that of the embeddings.
    pub lm_head: Option<Linear>,
}

/// Embeddings, layers and norm.
#[derive(Module, Debug)]
pub struct HubDecoder {
    /// `[V, D]`
    pub embed_tokens: Embedding,
    /// The layers.
    pub layers: Vec<HubLayer>,
    /// Before the head.
    pub norm: RmsNorm,
}

/// A decoder layer.
#[derive(Module, Debug)]
pub struct HubLayer {
    /// Attention.
    pub self_attn: HubAttention,
    /// With experts or without.
    pub mlp: HubMlp,
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Before the MLP.
    pub post_attention_layernorm: RmsNorm,
}

/// A layer's MLP.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum HubMlp {
    /// With experts.
    Sparse(FSEPMoE),
    /// Without.
    Dense(HubDenseMlp),
}

/// An MLP without experts.
#[derive(Module, Debug)]
pub struct HubDenseMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// The projections of all kinds of attention.
#[derive(Module, Debug)]
pub struct HubAttention {
    q_proj: Option<Linear>,
    k_proj: Option<Linear>,
    v_proj: Option<Linear>,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    sinks: Option<Param<Tensor<1>>>,
    q_a_proj: Option<Linear>,
    q_a_layernorm: Option<RmsNorm>,
    q_b_proj: Option<Linear>,
    kv_a_proj_with_mqa: Option<Linear>,
    kv_a_layernorm: Option<RmsNorm>,
    kv_b_proj: Option<Linear>,
    o_proj: Linear,
}

impl HubModel {
    /// A model of a folder's configuration, whose layers are `moe`.
    ///
    /// # Errors
    ///
    /// As [`FSEPMoEConfig::try_init`].
    pub fn new(
        config: &ModelConfig,
        moe: &FSEPMoEConfig,
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<Self, FsepError> {
        let width = config.hidden_size;
        let norm = || RmsNormConfig::new(width).init(device);
        let layer = |is_sparse: &bool| -> Result<HubLayer, FsepError> {
            let linear = |from, to| LinearConfig::new(from, to).with_bias(false).init(device);
            let ffn = config.intermediate_size;
            let mlp = match is_sparse {
                true => HubMlp::Sparse(moe.try_init(runtime, device)?),
                false => HubMlp::Dense(HubDenseMlp {
                    gate_proj: linear(width, ffn),
                    up_proj: linear(width, ffn),
                    down_proj: linear(ffn, width),
                }),
            };
            let self_attn = HubAttention::new(config, device);
            Ok(HubLayer { self_attn, mlp, input_layernorm: norm(), post_attention_layernorm: norm() })
        };
        let layers = config.sparse_layers.iter().map(layer).collect::<Result<_, _>>()?;
        let embed_tokens = EmbeddingConfig::new(config.vocab_size, width).init(device);
        let head = || LinearConfig::new(width, config.vocab_size).with_bias(false).init(device);
        let lm_head = (!config.tie_word_embeddings).then(head);
        Ok(Self { model: HubDecoder { embed_tokens, layers, norm: norm() }, lm_head })
    }

    /// The blocks with experts, by their layers.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, &FSEPMoE)> {
        self.model.layers.iter().enumerate().filter_map(|(layer, module)| match &module.mlp {
            HubMlp::Sparse(block) => Some((layer, block)),
            HubMlp::Dense(_) => None,
        })
    }
}

impl HubAttention {
    fn new(config: &ModelConfig, device: &Device) -> Self {
        let ModelConfig { hidden_size, num_attention_heads: heads, num_key_value_heads, head_dim, .. } = *config;
        let linear = |from, to, bias| LinearConfig::new(from, to).with_bias(bias).init(device);
        let norm = |width| RmsNormConfig::new(width).init(device);
        let bias = config.attention_bias;
        let mut all = Self {
            q_proj: None,
            k_proj: None,
            v_proj: None,
            q_norm: None,
            k_norm: None,
            sinks: config.attention_sinks.then(|| Param::from_tensor(Tensor::zeros([heads], device))),
            q_a_proj: None,
            q_a_layernorm: None,
            q_b_proj: None,
            kv_a_proj_with_mqa: None,
            kv_a_layernorm: None,
            kv_b_proj: None,
            o_proj: linear(heads * head_dim, hidden_size, config.attention_output_bias),
        };
        if let Some(mla) = config.mla {
            let width = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
            match mla.q_lora_rank {
                None => all.q_proj = Some(linear(hidden_size, heads * width, false)),
                Some(rank) => {
                    all.q_a_proj = Some(linear(hidden_size, rank, bias));
                    all.q_a_layernorm = Some(norm(rank));
                    all.q_b_proj = Some(linear(rank, heads * width, false));
                }
            }
            all.kv_a_proj_with_mqa = Some(linear(hidden_size, mla.kv_lora_rank + mla.qk_rope_head_dim, bias));
            all.kv_a_layernorm = Some(norm(mla.kv_lora_rank));
            let width = heads * (mla.qk_nope_head_dim + mla.v_head_dim);
            all.kv_b_proj = Some(linear(mla.kv_lora_rank, width, false));
            all.o_proj = linear(heads * mla.v_head_dim, hidden_size, config.attention_output_bias);
            return all;
        }
        let (q, kv) = (heads * head_dim, num_key_value_heads * head_dim);
        all.q_proj = Some(linear(hidden_size, q, bias));
        all.k_proj = Some(linear(hidden_size, kv, bias));
        all.v_proj = Some(linear(hidden_size, kv, bias));
        let widths = match config.qk_norm {
            QkNorm::None => return all,
            QkNorm::PerHead => [head_dim, head_dim],
            QkNorm::AllHeads => [q, kv],
        };
        [all.q_norm, all.k_norm] = widths.map(|width| Some(norm(width)));
        all
    }
}

/// The path and the value of each parameter of a model; paths are without variants of enums.
pub fn named_parameters<M: Module>(model: &M) -> Vec<(String, TensorData)> {
    let mut walk = Walk::default();
    model.visit(&mut walk);
    walk.found
}

#[derive(Default)]
struct Walk {
    /// Names, and whether they are variants.
    path: Vec<(String, bool)>,
    found: Vec<(String, TensorData)>,
}

impl ModuleVisitor for Walk {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.into(), container.starts_with("Enum:")));
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let names: Vec<_> =
            self.path.iter().filter(|(_, is_variant)| !is_variant).map(|(name, _)| name.as_str()).collect();
        self.found.push((names.join("."), param.val().into_data()));
    }
}
