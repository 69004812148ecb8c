//! The backend extension: one differentiable operation for a whole MoE layer after its router, written once for every
//! backend, and the kernels that a backend may replace by faster ones.

mod autodiff;
mod combine;
mod exchange;
mod experts;
mod extension;
#[cfg(feature = "flex")]
mod flex;
mod gradients;
mod kernels;
#[cfg(feature = "libtorch")]
mod libtorch;
mod moe;
mod step;
mod weights;

pub use exchange::{PendingDevice, PendingHost, PendingTensor, start_host_exchange};
pub use extension::{FsepOps, moe, run_moe, run_start_restore};
pub(crate) use extension::{share_memory, start_restore};
pub use kernels::{CombineGradients, ExpertsBackward, ExpertsGradients, ExpertsOutput, FsepKernels, RowIndices};
pub use step::{MoeStep, Tracked, WeightStorage};
pub(crate) use step::{Restores, token_exchange};
pub use weights::ExpertWeights;
