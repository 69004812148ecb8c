use super::{SharedExpert, TopKRouter, forced_router::ForcedRouter, losses::AuxiliaryLosses};
use crate::ops::ExpertActivation;

/// What the dense layer and the sharded one have alike.
pub(super) struct Replicated {
    pub router: TopKRouter,
    pub shared_expert: Option<SharedExpert>,
    pub losses: AuxiliaryLosses,
    pub forced: Option<ForcedRouter>,
    pub activation: ExpertActivation,
    /// The layer's number in its runtime.
    pub layer: usize,
}
