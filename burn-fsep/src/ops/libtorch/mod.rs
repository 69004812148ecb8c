//! Burn's LibTorch backend.
//!
//! The experts' products write straight to where they belong, so that nothing is concatenated, and element-wise work runs
//! once over all slots. On an NVIDIA GPU in bf16, SwiGLU and the combination of the experts' outputs are kernels of our
//! own, since LibTorch has no fused ones: apart they take a sixth of a layer's time.

mod activation;
mod adamw;
mod combine;
mod cuda;
mod device_exchange;
mod device_ops;
mod experts;
mod kernels;
mod places;
mod reduce;
mod routing;

pub(crate) use adamw::{AdamWStep, AdamWTensors, fused_adamw, fuses_adamw};
