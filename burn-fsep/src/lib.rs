//! Fully Sharded Expert Parallel (FSEP) for Mixture-of-Experts models in Burn.
//!
//! Every expert's parameters are cut into `N` equal shards, one a rank. Before a layer computes, an All-to-All unshards
//! whole experts, on each rank those that the layout gives it; in backward, gradients go back to the shards. So any
//! layout can be used in any step, an expert may stand on many ranks, and optimizer state never moves. A planner
//! ([`planner`]) chooses layouts that leave no rank waiting.
//!
//! - [`FSEPMoEConfig`] and [`FSEPMoE`]: the layer;
//! - [`FsepRuntime`]: a rank's communicators, layouts and statistics;
//! - [`comm`]: communicators, what FSEP needs from a process group;
//! - [`launch`]: being a rank, as a thread or as a process of a launcher, with one call;
//! - [`checkpoint`]: checkpoints of sharded training, for any number of ranks;
//! - [`hub`]: model folders as Hugging Face transformers writes them, read and written by any number of ranks;
//! - [`train`]: whole training steps ([`train::Trainer`]), and the parts that they are made of;
//! - `learner` (the feature of that name): training through burn-train's Learner;
//! - [`planner`]: the crate `burn-fsep-planner`, for layouts, topologies, dispatchers and planners.
//!
//! Shapes use the letters `N` ranks, `E` experts, `C` slots a rank, `K` experts per token, `T` tokens of a rank, `D`
//! hidden size, `F` expert intermediate size, `P` parameters of an expert, `S` shard length.
//!
//! # Features
//!
//! | feature | what it adds |
//! | --- | --- |
//! | `flex` (default) | Burn's CPU backend |
//! | `learner` (default) | `learner`: training through burn-train's Learner; `dataset` |
//! | `dataset` | `train::RankDataset`: a rank's part of one of Burn's data sets |
//! | `vulkan`, `webgpu`, `cuda`, `rocm`, `metal` | Burn's own GPU backends; `cuda` and `rocm` download LLVM when they are built |
//! | `libtorch` | Burn's LibTorch backend, on CPU and CUDA; LibTorch has to be found when it is built |
//! | `nccl` | `comm::nccl`: collectives between GPUs; NCCL is loaded at run time |
//! | `mpi` | `comm::mpi`: collectives over MPI; needs an MPI library with its headers, and libclang |
//! | `cli` | the command `fsep-launch`, and `launch::launcher` |
//!
//! Reference: LAER-MoE, arXiv 2602.11686.

// Burn deprecates its LibTorch backend in favour of CubeCL; until that is as fast, the feature `libtorch` uses it.
#![cfg_attr(feature = "libtorch", allow(deprecated))]

mod burn_compat;
pub mod checkpoint;
pub mod comm;
mod error;
pub mod hub;
pub mod launch;
#[cfg(feature = "learner")]
pub mod learner;
pub mod moe;
mod ops;
mod runtime;
mod schedule;
pub mod shard;
mod timeline;
pub mod train;
pub use burn_fsep_planner as planner;
pub use error::FsepError;
pub use moe::{ExpertParallelism, FSEPMoE, FSEPMoEConfig};
pub use runtime::{FsepRuntime, FsepRuntimeConfig, LayerStats, StepStats, TokenRows};
pub use schedule::ScheduleConfig;
pub use timeline::{Timeline, TimelineRecord, TimelineSpan};
