//! Fully Sharded Expert Parallel
pub mod comm;
mod error;
pub mod moe;
pub mod ops;
mod runtime;
pub mod shard;
#[cfg(feature = "train")]
pub mod train;
pub use error::FsepError;
pub use moe::{ExpertParallelism, FSEPMoE, FSEPMoEConfig};
pub use runtime::{FsepRuntime, FsepRuntimeConfig, LayerStats, StepStats, percentile};
