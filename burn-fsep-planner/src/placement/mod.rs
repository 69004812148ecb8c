//! Layout solvers: which expert stands in which slot, from predicted counts.

mod bound;
mod builder;
mod eplb;
mod flex_moe;
mod group;
mod paper;
mod random;
mod replicas;
mod robust;
mod solver;
mod static_ep;

pub use bound::least_max_load;
pub use eplb::Eplb;
pub use flex_moe::FlexMoe;
pub use paper::PaperSolver;
pub use random::RandomPlacement;
pub use robust::RobustSolver;
pub use solver::{LayoutRequest, LayoutSolver};
pub use static_ep::StaticEp;
