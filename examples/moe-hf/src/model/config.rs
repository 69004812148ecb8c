use burn_fsep::FSEPMoEConfig;

use super::RopeConfig;

/// What a decoder is made of.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    /// Hidden size `D`.
    pub hidden_size: usize,
    /// Rows of the embeddings `V`.
    pub vocab_size: usize,
    /// Query heads `H`.
    pub num_heads: usize,
    /// Heads of keys and values, each for `H / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Added to the mean square in every normalisation.
    pub rms_norm_eps: f64,
    /// Position embeddings.
    pub rope: RopeConfig,
    /// Whether queries and keys are normalised, and over what.
    pub qk_norm: Option<QkNorm>,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the projection of attention's output has one.
    pub output_bias: bool,
    /// Largest absolute value of queries, keys and values.
    pub clip_qkv: Option<f64>,
    /// Positions that each layer's attention sees, the own one among them; `None` is all. One for each layer.
    pub sliding_windows: Vec<Option<usize>>,
    /// The feed-forward layers, one for each layer.
    pub feed_forwards: Vec<FeedForwardConfig>,
    /// Whether the embeddings are also the projection to logits.
    pub tie_word_embeddings: bool,
    /// Weight of the load-balancing loss in the model's own training.
    pub router_aux_loss_coef: f64,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// Over what queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head (Qwen3).
    Head,
    /// The whole projection (OLMoE).
    Projection,
}

/// A feed-forward layer.
#[derive(Debug, Clone)]
pub enum FeedForwardConfig {
    /// Experts.
    Sparse(Box<FSEPMoEConfig>),
    /// One SwiGLU network of this intermediate size.
    Dense(usize),
}
