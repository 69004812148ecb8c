//! Attention and normalisation of a transformer on any backend: on LibTorch by its own operations, since Burn's would fill the step,
//! elsewhere by Burn's.

use burn::tensor::{FloatDType, Tensor, module, ops::AttentionModuleOptions};

use crate::BackwardMark;
#[cfg(feature = "libtorch")]
use crate::fused;

/// Causal attention. `[B, H, L, D / H]`, three times and once
pub fn attention(query: Tensor<4>, key: Tensor<4>, value: Tensor<4>) -> Tensor<4> {
    #[cfg(feature = "libtorch")]
    if is_libtorch(&query) {
        return fused::attention(query, key, value);
    }
    let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
    module::attention(query, key, value, None, None, options)
}

/// RMS normalisation with a weight, `[D]`. `[T, D] -> [T, D]`
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, mark: BackwardMark) -> Tensor<2> {
    #[cfg(feature = "libtorch")]
    if is_libtorch(&x) {
        return fused::rms_norm(x, weight, mark);
    }
    let _ = mark;
    let dtype = x.dtype();
    let wide = x.cast(FloatDType::F32);
    let scale = (wide.clone().square().mean_dim(1) + 1e-6).sqrt();
    (wide / scale).cast(dtype) * weight.cast(dtype).unsqueeze()
}

#[cfg(feature = "libtorch")]
fn is_libtorch<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.device().inner().as_dispatch(), burn::backend::DispatchDevice::LibTorch(_))
}
