//! The MoE layer: router, experts, and the layer that puts them together; and the dense layer that it must equal.

mod assignments;
mod config;
mod dense;
mod experts;
mod forced;
mod layer;
mod losses;
mod mask;
mod router;
mod tokens;

pub use config::{ExpertParallelism, FSEPMoEConfig};
pub use dense::DenseMoE;
pub(crate) use experts::ExpertsInfo;
pub use experts::FsepExperts;
pub use forced::{ForcedRouter, RouterForcing};
pub use layer::{FSEPMoE, MoeOutput};
pub use mask::TokenMask;
pub use router::{RouterOutput, TopKRouter};
