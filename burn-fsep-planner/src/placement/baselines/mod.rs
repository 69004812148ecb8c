//! Solvers of other systems, to compare with.

mod builder;
mod eplb;
mod flex_moe;
mod paper;
mod random;
mod replicas;
mod static_ep;

pub use eplb::Eplb;
pub use flex_moe::FlexMoe;
pub use paper::PaperSolver;
pub use random::RandomPlacement;
pub use static_ep::StaticEp;
