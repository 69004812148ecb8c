use crate::{PlannerError, Topology, cost::CostConstants};

/// When a repair pays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RepairConfig {
    /// Constants of cluster and model.
    pub constants: CostConstants,
    /// Bytes of one expert's parameters: what a changed slot receives. 0 where all slots are restored anyway after the
    /// counts are known, so that a repair costs nothing.
    pub bytes_per_expert: f64,
    /// Imbalance (max/mean) up to which nothing is repaired.
    pub tolerance: f64,
}

impl RepairConfig {
    /// Repairs that cost nothing: weights are restored after the counts are known.
    pub fn free() -> Self {
        Self { constants: CostConstants::paper_mixtral_8x7b(), bytes_per_expert: 0.0, tolerance: 1.01 }
    }

    /// Checks that numbers are finite and in their ranges.
    ///
    /// # Errors
    ///
    /// [`PlannerError::NotFinite`] for constants that are not positive, bytes below 0 or a tolerance below 1.
    pub fn check(&self) -> Result<(), PlannerError> {
        self.constants.check()?;
        for (what, value, least) in
            [("bytes_per_expert", self.bytes_per_expert, 0.0), ("tolerance", self.tolerance, 1.0)]
        {
            if !value.is_finite() || value < least {
                return Err(PlannerError::NotFinite { what: format!("{what} (at least {least})"), value });
            }
        }
        Ok(())
    }

    /// Seconds until the experts have come that ranks receive in a repair, `received` of each, shape `[N]`: behind nothing, on
    /// the port that is busy longest. A rank receives a shard of an expert from every rank, so of an expert's bytes
    /// `(G - 1) / N` come from its own node and `(N - G) / N` from others.
    ///
    /// # Panics
    ///
    /// If there are more numbers than ranks.
    pub fn transfer_seconds(&self, topology: &Topology, received: &[usize]) -> f64 {
        let ranks = topology.world_size() as f64;
        let seconds = |(rank, &received): (usize, &usize)| {
            let near = topology.ranks_of(topology.node_of(rank)).len() as f64;
            let within = (near - 1.0) / ranks / self.constants.intra_node_bytes_per_second;
            let between = (ranks - near) / ranks / self.constants.inter_node_bytes_per_second;
            received as f64 * self.bytes_per_expert * within.max(between)
        };
        received.iter().enumerate().map(seconds).fold(0.0, f64::max)
    }

    /// Seconds that three passes of compute, forward and backward, take longer with `before` assignments on the slowest rank
    /// than with `after`.
    pub(super) fn saved_seconds(&self, before: u64, after: u64) -> f64 {
        3.0 * before.saturating_sub(after) as f64 * self.constants.seconds_per_assignment
    }
}
