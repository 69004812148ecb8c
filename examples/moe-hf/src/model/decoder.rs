use burn::{
    module::{Initializer, Module},
    nn::{Embedding, EmbeddingConfig, Linear, RmsNorm, RmsNormConfig},
    tensor::{DType, Device, FloatDType, Int, Tensor},
};
use burn_fsep::{
    FsepError, FsepRuntime,
    moe::{LayerRouting, TokenMask},
    train::{GradientBuckets, GradientBucketsConfig},
};

use super::{
    DecoderConfig, DecoderLayer,
    linear::{linear, rms_norm},
    positions::Positions,
};

/// A decoder with its projection to logits.
#[derive(Module, Debug)]
pub struct CausalLm {
    /// Embeddings, layers and the last normalisation.
    pub model: Decoder,
    /// `D -> V`; `None` if the embeddings are it.
    pub lm_head: Option<Linear>,
    #[module(skip)]
    config: DecoderConfig,
    #[module(skip)]
    buckets: GradientBuckets,
    #[module(skip)]
    compute_dtype: FloatDType,
}

/// Embeddings, layers and the last normalisation.
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[V, D]`
    pub embed_tokens: Embedding,
    /// From the first to the last.
    pub layers: Vec<DecoderLayer>,
    /// After the last layer.
    pub norm: RmsNorm,
}

/// What a forward pass returns.
#[derive(Debug, Clone)]
pub struct DecoderOutput {
    /// Of the token after each, in the type of the computation. `[B * L, V]`
    pub logits: Tensor<2>,
    /// How each layer of experts has routed, for the load-balancing loss.
    pub routings: Vec<LayerRouting>,
}

impl CausalLm {
    /// A model with random values. `compute_dtype` is the type in which it computes.
    ///
    /// # Errors
    ///
    /// What [`FSEPMoEConfig::try_init`](burn_fsep::FSEPMoEConfig::try_init) returns.
    pub fn new(
        config: &DecoderConfig,
        compute_dtype: FloatDType,
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<Self, FsepError> {
        let DecoderConfig { hidden_size, vocab_size, .. } = *config;
        let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
        let layer = |layer: usize| DecoderLayer::new(config, layer, runtime, device);
        let model = Decoder {
            embed_tokens: EmbeddingConfig::new(vocab_size, hidden_size).with_initializer(initializer).init(device),
            layers: (0..config.feed_forwards.len()).map(layer).collect::<Result<_, _>>()?,
            norm: RmsNormConfig::new(hidden_size).with_epsilon(config.rms_norm_eps).init(device),
        };
        let lm_head = (!config.tie_word_embeddings).then(|| linear(hidden_size, vocab_size, false, device));
        let buckets = GradientBucketsConfig::new().with_compute_dtype(Some(compute_dtype)).init(runtime);
        Ok(Self { model, lm_head, config: config.clone(), buckets, compute_dtype })
    }

    /// What it is made of.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The buckets that its layers are prepared for, for [`TrainerConfig`](burn_fsep::train::TrainerConfig).
    pub fn buckets(&self) -> &GradientBuckets {
        &self.buckets
    }

    /// Logits of the token after each. Texts that are shorter than others are padded at their end; `mask` says which tokens are
    /// real. No real token sees padding, and of padding nothing is computed by experts. Collective. `ids`: `[B, L]`
    ///
    /// # Panics
    ///
    /// If a collective fails: run it inside of [`FsepRuntime::run`].
    pub fn forward(&self, ids: Tensor<2, Int>, mask: Option<&TokenMask>) -> DecoderOutput {
        let ([batch, length], device) = (ids.dims(), ids.device());
        let positions = Positions::new([batch, length], &self.config, DType::from(self.compute_dtype), &device);
        let embedded = self.model.embed_tokens.forward(ids).cast(self.compute_dtype);
        // Rows of tokens: products of two matrices are faster than those of a batch of them.
        let mut hidden: Tensor<2> = embedded.reshape([batch * length, self.config.hidden_size]);
        let mut routings = Vec::new();
        for layer in &self.model.layers {
            let layer = self.buckets.prepare(layer, &hidden);
            let (output, routing) = layer.forward(hidden, &positions, mask);
            hidden = output;
            routings.extend(routing);
        }
        let norm = self.buckets.prepare(&self.model.norm, &hidden);
        hidden = rms_norm(&norm, hidden);
        let logits = match &self.lm_head {
            Some(head) => self.buckets.prepare(head, &hidden).forward(hidden),
            None => hidden.matmul(self.model.embed_tokens.weight.val().cast(self.compute_dtype).transpose()),
        };
        DecoderOutput { logits, routings }
    }
}
