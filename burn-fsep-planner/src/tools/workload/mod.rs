//! Workloads: routing counts as routers under study produce them, to compare planners on.
//!
//! The counts of a step follow from workload, shape (with its seed), layer and step alone, so that any step can be made
//! again by itself. Each token chooses `K` different experts: a source rank has at most as many assignments to an expert
//! as it has tokens. Shares that ask for more are cut there, and what is cut goes to the other experts in proportion.

mod draws;
mod kind;
mod rows;
mod shape;
mod shares;
#[cfg(test)]
mod tests;

pub use kind::{UnknownWorkload, Workload, WorkloadError};
pub use shape::WorkloadShape;
