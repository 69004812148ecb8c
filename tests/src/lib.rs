//! What the test suite is made of: models, references, comparisons and faults.
//!
//! Tests take a device and a way to start ranks from here, so that the same suite runs on every backend and
//! communicator.

#![cfg_attr(feature = "libtorch", allow(deprecated))]

mod collectives;
mod compare;
mod dispatchers;
mod engine;
mod faults;
mod golden;
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
pub use dispatchers::{RandomDispatch, SplitAny};
pub use engine::launch;
pub use faults::{CallRecord, Fault, FaultMode, FaultyCommunicator};
pub use golden::{FileTensor, GOLDEN, golden, read_model_tensors, read_safetensors, write_safetensors};
pub use hub_model::{HubAttention, HubDecoder, HubDenseMlp, HubLayer, HubMlp, HubModel, named_parameters};
pub use layouts::random_layout;
pub use model::{SmallMoe, SmallOutput, TaskBatch, TaskBatcher, TaskItem, dense_loss_curve, fixed_linear, task_items};
pub use parity::{ParityCase, ParityStep, check_parity, check_parity_of, check_parity_with};
pub use rank_processes::{Launcher, RankProcesses};
pub use rank_test::rank_of_process;
#[cfg(feature = "mpi")]
pub use rank_test::rank_over_mpi;
pub use trainer::Trainer;
pub use training::{GradientSync, HandTraining, LayoutSource, Trained, small_slots, train_by_hand, train_with_trainer};

use burn::tensor::Device;

/// The device that the suite runs on: Flex; with the feature `libtorch` the first GPU, or LibTorch's CPU if there is
/// none.
pub fn plain_device() -> Device {
    #[cfg(not(feature = "libtorch"))]
    return Device::flex();
    #[cfg(feature = "libtorch")]
    return if tch::Cuda::is_available() { Device::libtorch_cuda(0) } else { Device::libtorch() };
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
