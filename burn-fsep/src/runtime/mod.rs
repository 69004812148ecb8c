//! The runtime of a rank: its communicators, its layers' layouts, and what happened in the last step.

mod config;
mod dispatcher_factory;
mod expert_loads;
mod failure;
mod fsep_runtime;
mod layer_state;
mod layers;
mod observed_steps;
mod outputs;
mod passes;
mod routing_message;
mod stats;
mod step;
mod token_rows;

pub use config::FsepRuntimeConfig;
pub use fsep_runtime::FsepRuntime;
pub(crate) use layer_state::ChunkStart;
pub(crate) use passes::PassStart;
pub use stats::{LayerStats, StepStats};
pub use token_rows::TokenRows;
