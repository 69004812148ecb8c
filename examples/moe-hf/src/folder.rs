use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
};

use burn::tensor::Device;
use burn_fsep::{
    FsepRuntime,
    hub::{HubFolder, LayerType, LoadConfig, ModelConfig, QkNorm, SaveConfig},
};

use crate::{
    MoeHfError, ParallelArgs,
    model::{self, CausalLm, DecoderConfig, FeedForwardConfig, RopeConfig},
};

/// A model's folder, and the decoder that it is of.
#[derive(Debug)]
pub struct ModelFolder {
    hub: HubFolder,
    decoder: DecoderConfig,
}

impl ModelFolder {
    /// # Errors
    ///
    /// What [`HubFolder::open`] returns; [`MoeHfError::Model`] if the model has layers that this program does not have.
    pub fn open(path: &Path) -> Result<Self, MoeHfError> {
        let hub = HubFolder::open(path)?;
        let decoder = DecoderConfig::from_hub(hub.config())?;
        Ok(Self { hub, decoder })
    }

    /// What the model is made of.
    pub fn decoder(&self) -> &DecoderConfig {
        &self.decoder
    }

    /// What config.json says.
    pub fn config(&self) -> &ModelConfig {
        self.hub.config()
    }

    /// By which models are told apart, without reading their weights.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        format!("{:?}", self.config()).hash(&mut hasher);
        hasher.finish()
    }

    /// A line about the model.
    pub fn describe(&self) -> String {
        let ModelConfig { family, num_hidden_layers, hidden_size, moe, .. } = self.config();
        format!(
            "{family} of {num_hidden_layers} layers, hidden size {hidden_size}, {} experts, {} a token",
            moe.num_experts, moe.num_experts_per_tok
        )
    }

    /// The model with this folder's values, a rank's part. Collective.
    ///
    /// # Errors
    ///
    /// What the model's construction and [`HubFolder::load`] return.
    pub fn load(
        &self,
        parallel: &ParallelArgs,
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<CausalLm, MoeHfError> {
        let decoder = self.decoder.clone().with_parallel(parallel);
        let model = CausalLm::new(&decoder, parallel.dtype.compute(), runtime, device)?;
        Ok(self.hub.load(model, &LoadConfig::new().with_runtime(runtime))?)
    }

    /// Saves a model of this folder's kind as a new folder in the hub's format, with this folder's tokenizer. Collective.
    ///
    /// # Errors
    ///
    /// What [`HubFolder::save`] returns.
    pub fn save(&self, model: &CausalLm, runtime: &FsepRuntime, output: &Path) -> Result<(), MoeHfError> {
        Ok(self.hub.save(runtime, model, output, &SaveConfig::new())?)
    }
}

impl DecoderConfig {
    /// The decoder that config.json says.
    ///
    /// # Errors
    ///
    /// [`MoeHfError::Model`] naming what this program does not have.
    pub fn from_hub(config: &ModelConfig) -> Result<Self, MoeHfError> {
        let lacks = |what: &str| {
            Err(MoeHfError::Model(format!(
                "the model is of the family {}, with {what}: this program runs Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE",
                config.family
            )))
        };
        if config.mla.is_some() {
            return lacks("multi-head latent attention");
        }
        if config.attention_sinks {
            return lacks("attention sinks");
        }
        if config.rope.partial_rotary_factor != 1.0 {
            return lacks("position embeddings of a part of each head");
        }
        if config.hidden_act != burn_fsep::hub::HiddenAct::Silu {
            return lacks("another nonlinearity than SiLU");
        }
        let moe = config.moe_config();
        let feed_forward = |is_sparse: &bool| match is_sparse {
            true => FeedForwardConfig::Sparse(Box::new(moe.clone())),
            false => FeedForwardConfig::Dense(config.intermediate_size),
        };
        let window = |kind: &LayerType| match kind {
            LayerType::SlidingAttention => config.sliding_window,
            LayerType::FullAttention => None,
        };
        Ok(Self {
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            num_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            rms_norm_eps: config.rms_norm_eps,
            rope: RopeConfig::new(
                config.rope.theta,
                config.head_dim,
                config.max_position_embeddings,
                config.rope.scaling.clone(),
            )?,
            qk_norm: match config.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => Some(model::QkNorm::Head),
                QkNorm::AllHeads => Some(model::QkNorm::Projection),
            },
            qkv_bias: config.attention_bias,
            output_bias: config.attention_output_bias,
            clip_qkv: config.clip_qkv,
            sliding_windows: config.layer_types.iter().map(window).collect(),
            feed_forwards: config.sparse_layers.iter().map(feed_forward).collect(),
            tie_word_embeddings: config.tie_word_embeddings,
            router_aux_loss_coef: config.moe.router_aux_loss_coef,
            eos_tokens: config.eos_token_ids.iter().map(|&token| token as u32).collect(),
        })
    }

    /// Only the first layers, where a number of them is given.
    ///
    /// # Errors
    ///
    /// [`MoeHfError::Option`] for more than there are.
    pub(crate) fn with_layers(mut self, layers: Option<usize>) -> Result<Self, MoeHfError> {
        let most = self.feed_forwards.len();
        let layers = layers.unwrap_or(most);
        if layers > most {
            return Err(MoeHfError::Option(format!("--layers {layers}: the model has only {most}")));
        }
        self.feed_forwards.truncate(layers);
        self.sliding_windows.truncate(layers);
        Ok(self)
    }

    /// The same with a rank's slots and types.
    pub(crate) fn with_parallel(mut self, parallel: &ParallelArgs) -> Self {
        let (compute, parameters) = (parallel.dtype.compute(), parallel.dtype.parameters());
        for feed_forward in &mut self.feed_forwards {
            if let FeedForwardConfig::Sparse(moe) = feed_forward {
                let mut with = moe.as_ref().clone().with_slots_per_rank(parallel.ranks.slots);
                if compute != parameters {
                    with = with.with_compute_dtype(Some(compute));
                }
                **moe = with;
            }
        }
        self
    }
}
