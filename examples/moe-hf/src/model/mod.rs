//! A decoder whose fields have transformers' names, so that files of the hub say which parameter is which.

mod attention;
mod config;
mod decoder;
mod feed_forward;
#[cfg(feature = "libtorch")]
mod fused;
mod layer;
mod linear;
mod loss;
mod mask;
mod positions;
mod rope;

pub use attention::SelfAttention;
pub use config::{DecoderConfig, FeedForwardConfig, QkNorm};
pub use decoder::{CausalLm, Decoder, DecoderOutput};
pub use feed_forward::{FeedForward, GatedMlp};
pub use layer::DecoderLayer;
pub use loss::next_token_loss;
pub use rope::{Rope, RopeConfig};
