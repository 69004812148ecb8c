use std::sync::Arc;

use super::ExpertsInfo;
use crate::{FsepRuntime, burn_compat::ModulePath, comm::Communicator};

/// Where a parameter lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Equal on all ranks.
    Replicated,
    /// A part that only this rank has, and those with the same place in other groups.
    Sharded,
}

impl Placement {
    /// That of the parameter at a place of a model.
    pub fn at(path: &ModulePath<ExpertsInfo>) -> Self {
        Self::of(path.metadata())
    }

    /// That of a parameter of these experts, or of none.
    pub fn of(experts: Option<&ExpertsInfo>) -> Self {
        if experts.is_some() { Self::Sharded } else { Self::Replicated }
    }

    /// The ranks that have the same values of the parameter, and so can share its optimizer state; `None` if no other rank has
    /// them.
    pub fn replicas(self, runtime: &FsepRuntime) -> Option<&Arc<dyn Communicator>> {
        match self {
            Self::Replicated => Some(runtime.dense_comm()),
            Self::Sharded => runtime.shards_comm(),
        }
    }
}
