//! The backend extension: one differentiable operation for a whole MoE layer after its router, written once for every
//! backend, and the kernels that a backend may replace by faster ones.

mod activation;
mod assignment_order;
mod autodiff;
mod by_assignment;
mod by_rank;
mod combine;
#[cfg(feature = "cube")]
mod cube;
mod device_check;
mod device_ops;
mod exchange;
mod expert_weights;
mod extension;
mod gradient_hook;
mod gradients;
mod kernels;
mod layer_spec;
#[cfg(feature = "libtorch")]
mod libtorch;
mod moe_pass;
mod multiply;
mod pass;
mod pass_rows;
mod places;
mod product;
mod rank_rows;
mod replica_mean;
mod replica_order;
mod replicas;
mod routed_dispatch;
mod row_exchange;
mod row_order;
mod slot_experts;
mod tensor_exchange;
mod types;
mod unshard;

pub use activation::ExpertActivation;
pub use assignment_order::counts_of;
pub use device_check::check_device;
pub use device_ops::{FsepDeviceOps, is_same, sums_of_squares};
pub use exchange::{all_gather, all_to_all};
pub use expert_weights::UnshardRequest;
pub use extension::{FsepOps, moe, plan_unshard};
pub use gradient_hook::{GradientHook, GradientSink, gradient_hook};
pub use kernels::FsepKernels;
pub use layer_spec::{LayerSpec, WeightStorage, options_of};
#[cfg(feature = "libtorch")]
pub(crate) use libtorch::{AdamWStep, AdamWTensors, fused_adamw, fuses_adamw};
pub use multiply::Transposed;
pub use pass::{BesideTokens, Deferred, LayerPass, PassHost, RankContext, Tracked, Unshards};
pub use product::product;
pub use rank_rows::{PlacedAssignments, RankRows};
pub use routed_dispatch::{ChunkDispatch, RoutedDispatch, chunk_ranges, token_exchange};
pub use unshard::Unshard;
