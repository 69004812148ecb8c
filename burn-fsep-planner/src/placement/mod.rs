//! Layout solvers: which expert stands in which slot, from predicted counts.

mod baselines;
mod group;
mod robust;
mod solver;

pub use baselines::{Eplb, FlexMoe, PaperSolver, RandomPlacement, StaticEp};
pub use robust::RobustSolver;
pub use solver::{LayoutRequest, LayoutSolver};
