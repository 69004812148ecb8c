//! When communication starts: experts of the next layer are unsharded behind the compute of the current one, in forward and
//! in backward, and gradients return to their shards behind the backward pass of the layer before.
//!
//! Reference: LAER-MoE, section 4 (communication scheduling).

mod config;
mod layer_order;
mod rank_schedule;

pub use config::ScheduleConfig;
pub(crate) use rank_schedule::{ForwardStart, Schedule};
