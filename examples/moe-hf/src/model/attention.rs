use burn::{
    module::Module,
    nn::{Linear, RmsNorm, RmsNormConfig},
    tensor::{DType, Device, Tensor, activation::softmax},
};

use super::{
    DecoderConfig, QkNorm,
    linear::{linear, rms_norm},
    positions::Positions,
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

    /// `[B * L, D] -> [B * L, D]`
    pub(super) fn forward(&self, hidden: Tensor<2>, positions: &Positions) -> Tensor<2> {
        let query = self.project(&self.q_proj, self.q_norm.as_ref(), hidden.clone());
        let key = self.project(&self.k_proj, self.k_norm.as_ref(), hidden.clone());
        let value = self.project(&self.v_proj, None, hidden);
        self.o_proj.forward(self.attend(query, key, value, positions))
    }

    /// Queries, keys or values, not rotated yet. `[T, D] -> [T, heads * head_dim]`
    fn project(&self, projection: &Linear, norm: Option<&RmsNorm>, hidden: Tensor<2>) -> Tensor<2> {
        let projected = projection.forward(hidden);
        let [tokens, width] = projected.dims();
        let normalised = match norm {
            // Over heads, or over whole projections, as wide as the weight is.
            Some(norm) => {
                let part = norm.gamma.dims()[0];
                rms_norm(norm, projected.reshape([tokens * width / part, part])).reshape([tokens, width])
            }
            None => projected,
        };
        match self.clip_qkv {
            Some(limit) => normalised.clamp(-limit, limit),
            None => normalised,
        }
    }

    /// Rotates queries and keys, and attends. `[B * L, H * head_dim]`, `[B * L, KV * head_dim]` twice
    /// `-> [B * L, H * head_dim]`
    fn attend(&self, query: Tensor<2>, key: Tensor<2>, value: Tensor<2>, positions: &Positions) -> Tensor<2> {
        let Positions { batch, length, rope, mask } = positions;
        let Some(mask) = mask else {
            #[cfg(feature = "libtorch")]
            return super::fused::attention(
                [query, key, value],
                rope,
                super::fused::AttentionShape {
                    batch: *batch,
                    length: *length,
                    head_dim: self.head_dim,
                    window: self.sliding_window,
                },
            );
            #[cfg(not(feature = "libtorch"))]
            unreachable!("without fused kernels there is a mask");
        };
        let [tokens, width] = query.dims();
        let heads = |x: Tensor<2>| {
            let heads = x.dims()[1] / self.head_dim;
            x.reshape([*batch, *length, heads, self.head_dim]).swap_dims(1, 2)
        };
        let (query, key) = (rope.rotate(heads(query)), rope.rotate(heads(key)));
        let attended = attention(query, key, heads(value), mask.of(self.sliding_window));
        attended.swap_dims(1, 2).reshape([tokens, width])
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
