//! Layout solvers: which expert stands in which slot, from predicted counts.

mod baselines;
mod group;
mod packing;
mod robust;
mod solver;

pub use baselines::{Eplb, FlexMoe, PaperSolver, RandomPlacement, StaticEp};
pub(crate) use packing::{Packing, Part};
pub use robust::RobustSolver;
pub use solver::{LayoutRequest, LayoutSolver};
