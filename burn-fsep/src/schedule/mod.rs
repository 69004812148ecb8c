//! When communication starts: experts of the next layer are restored behind the compute of the current one, in forward and
//! in backward, and gradients return to their shards behind the backward pass of the layer before.
//!
//! Reference: LAER-MoE, section 4 (communication scheduling).

mod config;
mod order;
mod restore;
mod state;

pub use config::ScheduleConfig;
pub use restore::Restore;
pub(crate) use state::{Entry, Schedule};
