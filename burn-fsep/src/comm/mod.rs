//! Communicators: what FSEP needs from a process group, and the engines that provide it.

mod communicator;
mod error;
pub mod local;

pub use communicator::{
    Block, Communicator, ExchangePlan, Operation, PendingExchange, ReduceBuffer, ReduceOp, all_gather_u64,
};
pub use error::CommError;
