//! The backend extension: one differentiable operation for a whole MoE layer after its router, written once for every
//! backend, and the kernels that a backend may replace by faster ones.

mod autodiff;
mod combine;
mod exchange;
mod experts;
mod extension;
mod gradients;
mod hook;
mod kernels;
#[cfg(feature = "libtorch")]
mod libtorch;
mod moe;
mod reduce;
mod routing;
mod step;
mod weights;

pub use exchange::{PendingDevice, PendingHost, PendingTensor, start_host_exchange};
pub(crate) use extension::start_restore;
pub use extension::{FsepOps, moe};
pub use hook::{GradientHook, GradientSink, HookOps, gradient_hook};
pub use kernels::{CombineGradients, ExpertsBackward, ExpertsGradients, ExpertsOutput, FsepKernels, RowIndices};
#[cfg(feature = "libtorch")]
pub(crate) use libtorch::{AdamWStep, AdamWTensors, fused_adamw, fuses_adamw};
pub use reduce::ReduceOps;
pub(crate) use reduce::is_same;
pub use routing::RoutingOps;
pub(crate) use routing::{NOT_FINITE, counts_of};
pub use step::{MoeStep, Tracked, WeightStorage};
pub(crate) use step::{Restores, token_exchange};
pub use weights::ExpertWeights;
