//! The MoE layer: router, experts, and the layer that puts them together; and the dense layer that it must equal.

mod assignments;
mod config;
mod dense;
mod experts;
mod forced_router;
mod layer;
mod losses;
mod router;
mod router_output;
mod token_mask;
mod tokens;

pub use config::{ExpertParallelism, FSEPMoEConfig};
pub use dense::DenseMoE;
pub(crate) use experts::ExpertsInfo;
pub use experts::{FsepExperts, FsepExpertsOutput};
pub use forced_router::RouterForcing;
pub use layer::{FSEPMoE, MoeOutput};
pub use router::TopKRouter;
pub use router_output::RouterOutput;
pub use token_mask::TokenMask;
