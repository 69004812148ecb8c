//! The MoE layer: router, experts, and the layer that puts them together; and the dense layer that it must equal.

mod activate;
mod assignments;
mod choice;
mod config;
mod dense;
mod experts;
mod forced_router;
mod layer;
mod losses;
mod placement;
mod replicated;
mod router;
mod router_config;
mod router_output;
mod shared_expert;
mod token_mask;
mod tokens;

pub use crate::ops::ExpertActivation;
pub use config::{ExpertParallelism, FSEPMoEConfig};
pub use dense::DenseMoE;
pub(crate) use experts::ExpertsInfo;
pub use experts::{FsepExperts, FsepExpertsOutput};
pub use forced_router::RouterForcing;
pub use layer::{FSEPMoE, MoeOutput};
pub use losses::{LayerRouting, LoadBalancing, pooled_load_balancing_loss};
pub(crate) use placement::Placement;
pub(crate) use router::RouterInfo;
pub use router::TopKRouter;
pub use router_config::{ExpertBiasConfig, GroupScore, RouterGroups, ScoreFunction, TopKRouterConfig};
pub use router_output::RouterOutput;
pub use shared_expert::{SharedExpert, SharedExpertConfig};
pub use token_mask::TokenMask;
