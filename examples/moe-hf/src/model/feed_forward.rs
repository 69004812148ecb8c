use burn::{
    module::Module,
    nn::Linear,
    tensor::{Device, Tensor, activation::silu},
};
use burn_fsep::{
    FSEPMoE, FsepError, FsepRuntime,
    moe::{LayerRouting, TokenMask},
};

use super::{FeedForwardConfig, linear::linear};

/// The feed-forward layer of a decoder layer. The variants' names are in no name of a parameter on the hub.
#[derive(Module, Debug)]
// A model has few of them, and Burn's modules cannot stand in a box.
#[allow(clippy::large_enum_variant)]
pub enum FeedForward {
    /// Experts sharded over ranks.
    Sparse(FSEPMoE),
    /// A network on every rank.
    Dense(GatedMlp),
}

impl FeedForward {
    pub(super) fn new(
        config: &FeedForwardConfig,
        hidden_size: usize,
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<Self, FsepError> {
        Ok(match config {
            FeedForwardConfig::Sparse(config) => Self::Sparse(config.try_init(runtime, device)?),
            FeedForwardConfig::Dense(width) => Self::Dense(GatedMlp::new(hidden_size, *width, device)),
        })
    }

    /// The output, and how a layer of experts has routed. `[T, D] -> [T, D]`
    pub(super) fn forward(&self, hidden: Tensor<2>, mask: Option<&TokenMask>) -> (Tensor<2>, Option<LayerRouting>) {
        match self {
            Self::Sparse(moe) => {
                let output = match mask {
                    Some(mask) => moe.forward_masked(hidden, mask),
                    None => moe.forward_with_losses(hidden),
                };
                (output.hidden, Some(output.routing))
            }
            Self::Dense(mlp) => (mlp.forward(hidden), None),
        }
    }
}

/// A SwiGLU network.
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// `D -> F`
    pub gate_proj: Linear,
    /// `D -> F`
    pub up_proj: Linear,
    /// `F -> D`
    pub down_proj: Linear,
}

impl GatedMlp {
    fn new(hidden_size: usize, width: usize, device: &Device) -> Self {
        Self {
            gate_proj: linear(hidden_size, width, false, device),
            up_proj: linear(hidden_size, width, false, device),
            down_proj: linear(width, hidden_size, false, device),
        }
    }

    /// `[T, D] -> [T, D]`
    pub fn forward(&self, hidden: Tensor<2>) -> Tensor<2> {
        let gate = silu(self.gate_proj.forward(hidden.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(hidden))
    }
}
