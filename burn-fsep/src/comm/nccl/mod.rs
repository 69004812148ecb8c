//! NCCL: ranks that have a GPU each, or (for tests) share one.
//!
//! The library is loaded at run time, so one program runs with and without it. NCCL itself can neither introduce ranks to
//! each other nor say who is missing; a second communicator over the same ranks, the control group, does both.

mod communicator;
mod config;
mod handle;
mod kernel_blocks;
mod pending;
mod watchdog;

pub use communicator::NcclCommunicator;
pub use config::NcclConfig;
