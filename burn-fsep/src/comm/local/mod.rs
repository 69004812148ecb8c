//! The local engine: ranks are threads of one process. Needs nothing installed and runs everywhere.

mod communicator;
mod launch;

pub use communicator::LocalCommunicator;
pub use launch::{LaunchConfig, RankError, launch};
