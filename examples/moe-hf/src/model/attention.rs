use burn::{
    module::Module,
    nn::{Linear, RmsNorm, RmsNormConfig},
    tensor::{DType, Device, Tensor, activation::softmax},
};

use super::{
    DecoderConfig, QkNorm, Rope,
    linear::{linear, rms_norm},
    mask::CausalMask,
};

/// Causal attention with rotary embeddings and grouped queries.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `D -> H * head_dim`
    pub q_proj: Linear,
    /// `D -> num_key_value_heads * head_dim`
    pub k_proj: Linear,
    /// `D -> num_key_value_heads * head_dim`
    pub v_proj: Linear,
    /// `H * head_dim -> D`
    pub o_proj: Linear,
    /// Of queries, for families that normalise them.
    pub q_norm: Option<RmsNorm>,
    /// Of keys.
    pub k_norm: Option<RmsNorm>,
    #[module(skip)]
    head_dim: usize,
    #[module(skip)]
    clip_qkv: Option<f64>,
    #[module(skip)]
    sliding_window: Option<usize>,
}

/// What all layers of a forward pass share.
#[derive(Debug, Clone)]
pub(super) struct Positions {
    pub rope: Rope,
    pub mask: CausalMask,
}

impl SelfAttention {
    pub(super) fn new(config: &DecoderConfig, layer: usize, device: &Device) -> Self {
        let DecoderConfig { hidden_size, head_dim, qkv_bias, .. } = *config;
        let [query, key] = [config.num_heads, config.num_key_value_heads].map(|heads| heads * head_dim);
        let norm = |width: usize| {
            let width = match config.qk_norm? {
                QkNorm::Head => head_dim,
                QkNorm::Projection => width,
            };
            Some(RmsNormConfig::new(width).with_epsilon(config.rms_norm_eps).init(device))
        };
        Self {
            q_proj: linear(hidden_size, query, qkv_bias, device),
            k_proj: linear(hidden_size, key, qkv_bias, device),
            v_proj: linear(hidden_size, key, qkv_bias, device),
            o_proj: linear(query, hidden_size, config.output_bias, device),
            q_norm: norm(query),
            k_norm: norm(key),
            head_dim,
            clip_qkv: config.clip_qkv,
            sliding_window: config.sliding_windows[layer],
        }
    }

    /// `[B, L, D] -> [B, L, D]`
    pub(super) fn forward(&self, hidden: Tensor<3>, positions: &Positions) -> Tensor<3> {
        let [batch, length, _] = hidden.dims();
        let query = self.heads(&self.q_proj, self.q_norm.as_ref(), hidden.clone());
        let key = self.heads(&self.k_proj, self.k_norm.as_ref(), hidden.clone());
        let value = self.heads(&self.v_proj, None, hidden);
        let (query, key) = (positions.rope.rotate(query), positions.rope.rotate(key));
        let attended = attention(query, key, value, positions.mask.of(self.sliding_window));
        let width = attended.dims()[1] * self.head_dim;
        self.o_proj.forward(attended.swap_dims(1, 2).reshape([batch, length, width]))
    }

    /// Queries, keys or values. `[B, L, D] -> [B, heads, L, head_dim]`
    fn heads(&self, projection: &Linear, norm: Option<&RmsNorm>, hidden: Tensor<3>) -> Tensor<4> {
        let [batch, length, _] = hidden.dims();
        let mut x = projection.forward(hidden);
        let width = x.dims()[2];
        let (whole, head): (Option<&RmsNorm>, _) = match norm {
            Some(norm) if norm.gamma.dims()[0] == self.head_dim && width != self.head_dim => (None, Some(norm)),
            norm => (norm, None),
        };
        x = whole.map_or_else(|| x.clone(), |norm| rms_norm(norm, x.clone()));
        let mut heads = x.reshape([batch, length, width / self.head_dim, self.head_dim]);
        if let Some(norm) = head {
            heads = rms_norm(norm, heads);
        }
        if let Some(limit) = self.clip_qkv {
            heads = heads.clamp(-limit, limit);
        }
        heads.swap_dims(1, 2)
    }
}

/// Softmax attention, in which each key and value head serves neighbouring query heads.
/// `[B, H, L, d]`, `[B, KV, L, d]` twice, `[1, 1, L, L] -> [B, H, L, d]`
fn attention(query: Tensor<4>, key: Tensor<4>, value: Tensor<4>, mask: Tensor<4>) -> Tensor<4> {
    let [batch, heads, length, dim] = query.dims();
    let [_, groups, ..] = key.dims();
    let (dtype, together) = (query.dtype(), heads / groups * length);
    // The queries of a group below each other: its keys need not be repeated.
    let query = (query * (dim as f64).powf(-0.5)).reshape([batch, groups, together, dim]);
    let scores = query.matmul(key.swap_dims(2, 3)).reshape([batch, heads, length, length]);
    let weights = softmax(scores.cast(DType::F32) + mask, 3).cast(dtype);
    let attended = weights.reshape([batch, groups, together, length]).matmul(value);
    attended.reshape([batch, heads, length, dim])
}
