//! The whole job, small.

mod bad_input;
mod checkpoints;
mod common;
#[cfg(target_os = "linux")]
mod kills;
mod launch_files;
#[cfg(feature = "libtorch")]
mod libtorch;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(unix)]
mod processes;
#[cfg(target_os = "linux")]
mod soak;
mod training;
