use burn::{
    module::Module,
    nn::{RmsNorm, RmsNormConfig},
    tensor::{Device, Tensor},
};
use burn_fsep::{
    FsepError, FsepRuntime,
    moe::{LayerRouting, TokenMask},
};

use super::{DecoderConfig, FeedForward, SelfAttention, linear::rms_norm, positions::Positions};

/// Attention and feed-forward, each normalised before.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: SelfAttention,
    /// Before the feed-forward layer.
    pub post_attention_layernorm: RmsNorm,
    /// The feed-forward layer.
    pub mlp: FeedForward,
}

impl DecoderLayer {
    pub(super) fn new(
        config: &DecoderConfig,
        layer: usize,
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<Self, FsepError> {
        let norm = || RmsNormConfig::new(config.hidden_size).with_epsilon(config.rms_norm_eps).init(device);
        Ok(Self {
            input_layernorm: norm(),
            self_attn: SelfAttention::new(config, layer, device),
            post_attention_layernorm: norm(),
            mlp: FeedForward::new(&config.feed_forwards[layer], config.hidden_size, runtime, device)?,
        })
    }

    /// `[T, D] -> [T, D]`
    pub(super) fn forward(
        &self,
        hidden: Tensor<2>,
        positions: &Positions,
        mask: Option<&TokenMask>,
    ) -> (Tensor<2>, Option<LayerRouting>) {
        let attended = self.self_attn.forward(rms_norm(&self.input_layernorm, hidden.clone()), positions);
        let hidden = hidden + attended;
        let (output, routing) = self.mlp.forward(rms_norm(&self.post_attention_layernorm, hidden.clone()), mask);
        (hidden + output, routing)
    }
}
