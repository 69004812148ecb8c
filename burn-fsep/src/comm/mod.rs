//! Communicators: what FSEP needs from a process group, and the engines that provide it.

mod check;
mod communicator;
mod device;
mod error;
pub mod local;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod process;
mod reduction;

pub use communicator::{
    Block, Communicator, ExchangePlan, Operation, PendingExchange, ReduceBuffer, ReduceOp, all_gather_u64,
};
pub use device::{DeviceCommunicator, PendingDeviceExchange};
pub use error::CommError;
