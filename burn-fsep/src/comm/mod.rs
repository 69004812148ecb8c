//! Communicators: what FSEP needs from a process group, and the engines that provide it.

mod agree;
mod collectives;
mod communicator;
#[cfg(any(feature = "mpi", feature = "nccl"))]
mod control_group;
mod device;
mod error;
mod exchange_plan;
mod groups;
#[cfg(any(feature = "mpi", feature = "nccl"))]
mod headers;
pub mod local;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
mod operation;
pub mod process;
mod reduce;
mod rounds;

pub use agree::{Difference, agree, digest};
pub(crate) use collectives::PendingAllReduce;
pub use communicator::{Communicator, PendingExchange, all_gather_u64};
pub use device::{ComputeStream, DeviceCommunicator, PendingDeviceExchange};
pub use error::CommError;
pub use exchange_plan::{Block, ExchangePlan};
pub use groups::Groups;
pub use operation::Operation;
pub use reduce::{ReduceBuffer, ReduceOp};
pub use rounds::RoundsCommunicator;
