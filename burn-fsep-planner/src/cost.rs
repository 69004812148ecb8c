//! What a layer costs under a dispatch plan.

use serde::{Deserialize, Serialize};

use crate::{PlannerError, Topology, dispatch::DispatchPlan};

/// Measured constants of a cluster and a model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CostConstants {
    /// Seconds of expert compute for one assignment, forward.
    pub seconds_per_assignment: f64,
    /// Bytes of one token in an All-to-All: `D` times the size of an element.
    pub bytes_per_token: f64,
    /// Bytes a second between ranks of one node.
    pub intra_node_bytes_per_second: f64,
    /// Bytes a second between ranks of different nodes.
    pub inter_node_bytes_per_second: f64,
}

impl CostConstants {
    /// The paper's constants for Mixtral 8x7B in bf16 (`D = 4096`) on 32 A100 GPUs in 4 nodes.
    pub fn paper_mixtral_8x7b() -> Self {
        Self {
            seconds_per_assignment: 0.001484375e-3,
            bytes_per_token: 4096.0 * 2.0,
            intra_node_bytes_per_second: 216.269e9,
            inter_node_bytes_per_second: 88.9539e9,
        }
    }

    /// Checks that all constants are finite and positive.
    ///
    /// # Errors
    ///
    /// [`PlannerError::NotFinite`] naming the first that is not.
    pub fn check(&self) -> Result<(), PlannerError> {
        for (what, value) in [
            ("seconds_per_assignment", self.seconds_per_assignment),
            ("bytes_per_token", self.bytes_per_token),
            ("intra_node_bytes_per_second", self.intra_node_bytes_per_second),
            ("inter_node_bytes_per_second", self.inter_node_bytes_per_second),
        ] {
            if !value.is_finite() || value <= 0.0 {
                return Err(PlannerError::NotFinite { what: format!("{what} (which must be positive)"), value });
            }
        }
        Ok(())
    }
}

/// How the communication time of a layer follows from who sends how much to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CommunicationModel {
    /// The paper's: the sum over ranks of their sending times.
    RankSum,
    /// An All-to-All ends when the busiest port ends: the maximum over ranks, of sending and receiving, within the
    /// node and between nodes.
    PortMax,
}

/// Time of one MoE layer: four token All-to-Alls (two in forward, two in backward) and three times the forward compute
/// of the slowest rank (four with recomputation). LAER-MoE, section 3.3.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    /// Constants of cluster and model.
    pub constants: CostConstants,
    /// How communication is counted.
    pub communication: CommunicationModel,
    /// Whether the forward pass is computed again in backward.
    pub recompute: bool,
}

impl CostModel {
    /// A cost model without recomputation.
    ///
    /// # Errors
    ///
    /// As [`CostConstants::check`].
    pub fn new(constants: CostConstants, communication: CommunicationModel) -> Result<Self, PlannerError> {
        constants.check()?;
        Ok(Self { constants, communication, recompute: false })
    }

    /// Sets whether the forward pass is computed again in backward.
    pub fn with_recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// Seconds of one layer, forward and backward.
    pub fn layer_seconds(&self, topology: &Topology, plan: &DispatchPlan) -> f64 {
        let passes = if self.recompute { 4.0 } else { 3.0 };
        let slowest = plan.loads().into_iter().max().unwrap_or(0) as f64;
        4.0 * self.all_to_all_seconds(topology, plan) + passes * slowest * self.constants.seconds_per_assignment
    }

    /// Seconds of one token All-to-All.
    pub fn all_to_all_seconds(&self, topology: &Topology, plan: &DispatchPlan) -> f64 {
        let c = &self.constants;
        // Tokens by rank on four ports: sent and received, within the node and between nodes.
        let mut ports = vec![[0u64; 4]; topology.world_size()];
        for (source, _, share) in plan.iter() {
            let rank = share.rank as usize;
            if source != rank {
                let between = usize::from(!topology.same_node(source, rank));
                ports[source][between] += u64::from(share.tokens);
                ports[rank][2 + between] += u64::from(share.tokens);
            }
        }
        let intra = |tokens: u64| tokens as f64 * c.bytes_per_token / c.intra_node_bytes_per_second;
        let inter = |tokens: u64| tokens as f64 * c.bytes_per_token / c.inter_node_bytes_per_second;
        match self.communication {
            CommunicationModel::RankSum => ports.iter().map(|p| intra(p[0]) + inter(p[1])).sum(),
            CommunicationModel::PortMax => {
                ports.iter().flat_map(|p| [intra(p[0]), inter(p[1]), intra(p[2]), inter(p[3])]).fold(0.0, f64::max)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Layout, RoutingCounts,
        dispatch::{Dispatcher, EvenSplit},
    };

    #[test]
    fn constants_must_be_positive() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let constants = CostConstants { bytes_per_token: bad, ..CostConstants::paper_mixtral_8x7b() };
            assert!(CostModel::new(constants, CommunicationModel::PortMax).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_busiest_port_counts_once_and_ranks_add_up() {
        let topology = Topology::uniform(2, 1).unwrap();
        let layout = Layout::from_rows(2, &[vec![0], vec![1]]).unwrap();
        let counts = RoutingCounts::from_rows(&[vec![0, 10], vec![30, 0]]).unwrap();
        let mut plan = DispatchPlan::new();
        EvenSplit::new().dispatch(&topology, &layout, &counts, &mut plan).unwrap();
        let constants = CostConstants {
            seconds_per_assignment: 1.0,
            bytes_per_token: 1.0,
            intra_node_bytes_per_second: 1.0,
            inter_node_bytes_per_second: 2.0,
        };
        let seconds = |communication| CostModel::new(constants, communication).unwrap().layer_seconds(&topology, &plan);
        assert_eq!(seconds(CommunicationModel::RankSum), 4.0 * 20.0 + 3.0 * 30.0);
        assert_eq!(seconds(CommunicationModel::PortMax), 4.0 * 15.0 + 3.0 * 30.0);
    }
}
