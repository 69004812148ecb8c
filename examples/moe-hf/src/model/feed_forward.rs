use burn::{
    module::Module,
    nn::Linear,
    tensor::{Device, Tensor, activation::silu},
};
use burn_fsep::{
    FSEPMoE, FsepError, FsepRuntime,
    moe::{MoeOutput, TokenMask},
};

use super::{FeedForwardConfig, linear::linear};

/// The feed-forward layer of a decoder layer. The variants' names are in no name of a parameter on the hub.
#[derive(Module, Debug)]
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

    /// The output, and what a layer of experts says about its routing. `[B, L, D] -> [B, L, D]`
    pub(super) fn forward(&self, hidden: Tensor<3>, mask: Option<&TokenMask>) -> (Tensor<3>, Option<MoeOutput<3>>) {
        match self {
            Self::Sparse(moe) => {
                let output = match mask {
                    Some(mask) => moe.forward_masked(hidden, mask),
                    None => moe.forward_with_losses(hidden),
                };
                (output.hidden.clone(), Some(output))
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

    /// `[B, L, D] -> [B, L, D]`
    pub fn forward(&self, hidden: Tensor<3>) -> Tensor<3> {
        let gate = silu(self.gate_proj.forward(hidden.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(hidden))
    }
}
