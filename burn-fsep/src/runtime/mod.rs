//! The runtime of a rank: its communicators, its layers' layouts, and what happened in the last step.

mod config;
mod handle;
mod layer;
mod stats;

pub use config::FsepRuntimeConfig;
pub use handle::FsepRuntime;
pub(crate) use handle::{Outputs, RestorePass};
pub(crate) use layer::LayerConfig;
pub use stats::{LayerStats, StepStats};
