//! What the test suite is made of: models, references, comparisons and faults.
//!
//! Tests take a device and a way to start ranks from here, so that the same suite runs on every backend and
//! communicator.

#![cfg_attr(feature = "libtorch", allow(deprecated))]

mod collectives;
mod compare;
mod dense_matrices;
mod dispatchers;
mod engine;
mod faults;
mod golden;
mod groups;
mod hub_model;
mod layouts;
mod model;
mod parity;
mod rank_processes;
mod rank_test;
mod trainer;
mod training;

pub use collectives::{
    check_blocks, check_duplicates, check_gather_and_broadcast, check_reductions, check_wrong_arguments,
};
pub use compare::{assert_close, relative_error};
pub use dense_matrices::{DenseMatrices, parameter_rows};
pub use dispatchers::{RandomDispatch, SplitAny};
pub use engine::{launch, launch_runtimes};
pub use faults::{CallRecord, Fault, FaultMode, FaultyCommunicator};
pub use golden::{FileTensor, GOLDEN, golden, read_model_tensors, read_safetensors, write_safetensors};
pub use groups::check_groups;
pub use hub_model::{HubAttention, HubDecoder, HubDenseMlp, HubLayer, HubMlp, HubModel, named_parameters};
pub use layouts::random_layout;
pub use model::{
    SmallMoe, SmallOutput, TaskBatch, TaskBatcher, TaskItem, dense_loss_curve, dense_loss_curve_on, fixed_linear,
    task_items,
};
pub use parity::{
    ParityCase, ParityStep, TOKEN_TRAVEL, TokenTravel, check_parity, check_parity_in_turn, check_parity_of,
};
pub use rank_processes::{Launcher, RankProcesses};
pub use rank_test::rank_of_process;
#[cfg(feature = "mpi")]
pub use rank_test::rank_over_mpi;
pub use trainer::Trainer;
pub use training::{
    GradientSync, HandTraining, LayoutSource, Trained, small_slots, train_by_hand, train_with_sharded_optimizer,
    train_with_trainer,
};

use std::time::Duration;

use burn::tensor::Device;
#[cfg(any(feature = "vulkan", feature = "webgpu"))]
use burn::tensor::DeviceKind;
use burn_fsep::comm::local::LaunchConfig;

/// The device that the suite runs on: that of the backend that `FSEP_TEST_BACKEND` names, of those that it was built with; without
/// it of the first one that was built of CUDA, Vulkan, WebGPU, LibTorch and Flex.
///
/// # Panics
///
/// If `FSEP_TEST_BACKEND` names none that was built.
pub fn plain_device() -> Device {
    type Backend = (&'static str, fn() -> Device);
    let built: &[Backend] = &[
        #[cfg(feature = "cuda")]
        ("cuda", || Device::cuda(0)),
        #[cfg(feature = "vulkan")]
        ("vulkan", || Device::vulkan(DeviceKind::DefaultDevice)),
        #[cfg(feature = "webgpu")]
        ("webgpu", || Device::wgpu(DeviceKind::DefaultDevice)),
        // The first GPU, or LibTorch's CPU where there is none.
        #[cfg(feature = "libtorch")]
        ("libtorch", || if tch::Cuda::is_available() { Device::libtorch_cuda(0) } else { Device::libtorch() }),
        ("flex", Device::flex),
    ];
    let device = match std::env::var("FSEP_TEST_BACKEND") {
        Err(_) => built.first(),
        Ok(asked) => built.iter().find(|(name, _)| *name == asked),
    };
    let names: Vec<&str> = built.iter().map(|(name, _)| *name).collect();
    device.unwrap_or_else(|| panic!("FSEP_TEST_BACKEND: this build has {}", names.join(", "))).1()
}

/// So many ranks that are threads. A driver in software compiles each kernel for up to a second when it first meets it, while
/// the other ranks wait.
pub fn launch_config(ranks: usize) -> LaunchConfig {
    let config = LaunchConfig::new(ranks);
    if cfg!(feature = "webgpu") { config.with_timeout(Duration::from_secs(300)) } else { config }
}

/// [`plain_device`], with gradients.
pub fn device() -> Device {
    plain_device().autodiff()
}

/// The README's program, run as a test.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct ReadmeProgram;

/// The guide's examples, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../docs/guide.md")]
pub struct GuideExamples;
