use burn::tensor::{DType, Device};

use super::{DecoderConfig, Rope, mask::CausalMask};

/// Where the tokens of a batch are: what all layers of a forward pass share.
#[derive(Debug, Clone)]
pub(super) struct Positions {
    /// Sequences `B`.
    pub batch: usize,
    /// Tokens of a sequence `L`.
    pub length: usize,
    /// Their angles.
    pub rope: Rope,
    /// What they see, where no fused kernel knows that.
    pub mask: Option<CausalMask>,
}

impl Positions {
    /// Those of `[B, L]` tokens that are computed with in `dtype`.
    pub fn new([batch, length]: [usize; 2], config: &DecoderConfig, dtype: DType, device: &Device) -> Self {
        let mask = (!is_fused(device)).then(|| CausalMask::new(&config.sliding_windows, length, device));
        Self { batch, length, rope: config.rope.init(length, dtype, device), mask }
    }
}

/// Whether kernels of LibTorch take the place of Burn's operations: Burn differentiates attention, normalisation and loss
/// operation by operation, and keeps what each needs.
pub(super) fn is_fused(device: &Device) -> bool {
    #[cfg(feature = "libtorch")]
    return super::fused::is_libtorch(device.as_dispatch());
    #[cfg(not(feature = "libtorch"))]
    {
        let _ = device;
        false
    }
}
