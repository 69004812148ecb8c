use serde::{Deserialize, Serialize};

use crate::{PlannerError, Topology};

/// The sizes of a workload, and its seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadShape {
    /// The ranks and their nodes.
    pub topology: Topology,
    /// Experts `E`.
    pub num_experts: usize,
    /// Experts per token `K`.
    pub topk: usize,
    /// Tokens on one rank in one step `T`; the mean over ranks where they have different numbers.
    pub tokens_per_rank: u32,
    /// Seed of all that is random.
    pub seed: u64,
}

impl WorkloadShape {
    /// World size `N`.
    pub fn num_ranks(&self) -> usize {
        self.topology.world_size()
    }

    /// Checks that tokens have enough experts to choose from and can be counted.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`], [`PlannerError::TopK`] or [`PlannerError::Overflow`].
    pub fn check(&self) -> Result<(), PlannerError> {
        for (what, value) in [("number of experts", self.num_experts), ("experts per token", self.topk)] {
            if value == 0 {
                return Err(PlannerError::Zero { what });
            }
        }
        if self.topk > self.num_experts {
            return Err(PlannerError::TopK { topk: self.topk, experts: self.num_experts });
        }
        let total =
            (self.num_ranks() as u64).saturating_mul(u64::from(self.tokens_per_rank)).saturating_mul(self.topk as u64);
        let limit = u64::from(u32::MAX);
        if total > limit {
            return Err(PlannerError::Overflow { what: "number of assignments in a step", value: total, limit });
        }
        Ok(())
    }
}
