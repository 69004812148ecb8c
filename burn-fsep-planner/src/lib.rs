//! Load balancing planner for fully sharded expert parallelism (FSEP).
//!
//! The planner decides, `burn-fsep` does. It answers two questions:
//!
//! - **layout**, before the step and from the routing of past steps: which expert does slot `c` of rank `r`
//!   hold ([`placement`])?
//! - **dispatch**, in the step and from its exact routing counts: which replica of an expert computes which
//!   tokens ([`dispatch`])?
//!
//! and, before a job starts, a third one: what will a rank's [`memory`] have to hold?
//!
//! The crate is pure Rust without Burn, does no I/O in its core and is deterministic: every rank computes the
//! same plan from the same counts, so no plan is ever sent.
//!
//! Notation, used in all shapes and docs: `N` ranks (world size), `G` ranks per node, `E` experts, `C` slots a
//! rank, `K` experts per token, `n[s, e]` routing counts, `A[r, c]` layout, `d[s, e, r]` dispatch, `L_r` load.
//!
//! # Features
//!
//! None is on by default: a training job compiles the core alone.
//!
//! - `tools`: the module `tools`, to study planners without a training: traces, replay, workloads, the simulator;
//! - `cli`: the command `fsep-planner` on top of them; implies `tools`.
//!
//! Reference: LAER-MoE, arXiv 2602.11686.

mod background;
pub mod cost;
pub mod dispatch;
mod error;
mod layer_planner;
mod layout;
pub mod memory;
pub mod placement;
pub mod predictor;
pub mod repair;
mod routing;
mod split_mix;
mod state;
mod strategy;
#[cfg(test)]
mod test_cases;
#[cfg(feature = "tools")]
pub mod tools;
mod topology;

pub use background::{AgreedLayouts, BackgroundPlanner, PendingStates, PlannerStates};
pub use error::PlannerError;
pub use layer_planner::LayerPlanner;
pub use layout::Layout;
pub use routing::RoutingCounts;
pub use split_mix::SplitMix64;
pub use strategy::{PlannerStrategy, UnknownStrategy};
pub use topology::Topology;

/// The README's example, run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeExample;
