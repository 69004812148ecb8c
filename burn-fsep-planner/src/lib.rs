//! Load balancing planner for fully sharded expert parallelism (FSEP).
//!
//! The planner decides, `burn-fsep` does. It answers two questions:
//!
//! - **layout**, before the step and from the routing of past steps: which expert does slot `c` of rank `r`
//!   hold ([`placement`])?
//! - **dispatch**, in the step and from its exact routing counts: which replica of an expert computes which
//!   tokens ([`dispatch`])?
//!
//! The crate is pure Rust without Burn, does no I/O in its core and is deterministic: every rank computes the
//! same plan from the same counts, so no plan is ever sent.
//!
//! Notation, used in all shapes and docs: `N` ranks (world size), `G` ranks per node, `E` experts, `C` slots a
//! rank, `K` experts per token, `n[s, e]` routing counts, `A[r, c]` layout, `d[s, e, r]` dispatch, `L_r` load.
//!
//! Reference: LAER-MoE, arXiv 2602.11686.

pub mod background;
#[cfg(feature = "train")]
pub mod callback;
#[cfg(feature = "cli")]
pub mod cli;
pub mod correction;
pub mod cost;
pub mod dispatch;
mod error;
mod layout;
pub mod placement;
mod planner;
#[cfg(feature = "train")]
mod planner_callback;
#[cfg(feature = "train")]
mod planner_config;
#[cfg(feature = "train")]
mod planner_report;
pub mod predictor;
pub mod replay;
mod rng;
mod routing;
pub mod simulator;
mod state;
#[cfg(test)]
mod test_cases;
mod topology;
pub mod trace;
pub mod workload;

pub use error::PlannerError;
pub use layout::Layout;
pub use planner::{LayerPlanner, Strategy, UnknownStrategy};
#[cfg(feature = "train")]
pub use planner_callback::PlannerCallback;
#[cfg(feature = "train")]
pub use planner_config::PlannerConfig;
#[cfg(feature = "train")]
pub use planner_report::PlannerReport;
pub use routing::RoutingCounts;
pub use topology::Topology;
