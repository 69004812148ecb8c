//! Tools that study planners without a training: traces, replay, workloads, the simulator and the command line.

pub mod benchmark;
mod bound;
#[cfg(feature = "cli")]
pub mod cli;
pub mod replay;
pub mod simulator;
pub mod token_trace;
pub mod trace;
pub mod workload;

pub use bound::least_max_load;
