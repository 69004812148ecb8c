use serde::{Deserialize, Serialize};

use super::SimulatorError;
use crate::{Topology, cost::CostConstants};

/// More ranks than any cluster has.
const MAX_RANKS: usize = 1 << 20;

/// [`CostConstants`] together with the expert they were measured on, so that they can be scaled to other experts.
///
/// `fsep-planner calibrate` writes this; [`CostConstants`] reads from the same JSON.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredConstants {
    /// Seconds of expert compute for one assignment, forward.
    pub seconds_per_assignment: f64,
    /// Bytes of one token in an All-to-All: `D` times the size of an element.
    pub bytes_per_token: f64,
    /// Bytes a second that a rank sends, or receives, within its node.
    pub intra_node_bytes_per_second: f64,
    /// Bytes a second of one port between nodes.
    pub inter_node_bytes_per_second: f64,
    /// Hidden size `D` of the measured expert.
    pub hidden_size: usize,
    /// Intermediate size `F` of the measured expert.
    pub intermediate_size: usize,
}

impl MeasuredConstants {
    /// FLOP/s of matrix products: a SwiGLU expert takes `6 * D * F` FLOP an assignment.
    pub fn matmul_flops_per_second(&self) -> f64 {
        6.0 * self.hidden_size as f64 * self.intermediate_size as f64 / self.seconds_per_assignment
    }

    /// The constants that the planner's cost model takes.
    pub fn cost_constants(&self) -> CostConstants {
        CostConstants {
            seconds_per_assignment: self.seconds_per_assignment,
            bytes_per_token: self.bytes_per_token,
            intra_node_bytes_per_second: self.intra_node_bytes_per_second,
            inter_node_bytes_per_second: self.inter_node_bytes_per_second,
        }
    }

    /// Checks that all constants are finite and positive.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] naming the first that is not.
    pub fn check(&self) -> Result<(), SimulatorError> {
        for (field, value) in [
            ("seconds_per_assignment", self.seconds_per_assignment),
            ("bytes_per_token", self.bytes_per_token),
            ("intra_node_bytes_per_second", self.intra_node_bytes_per_second),
            ("inter_node_bytes_per_second", self.inter_node_bytes_per_second),
        ] {
            positive(field, value)?;
        }
        at_least_one("hidden_size", self.hidden_size)?;
        at_least_one("intermediate_size", self.intermediate_size)
    }
}

/// A cluster: how many ranks, how fast they compute and how fast they talk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterSpec {
    /// Number of nodes.
    pub nodes: usize,
    /// Ranks on each node `G`.
    pub ranks_per_node: usize,
    /// Measured rates.
    pub constants: MeasuredConstants,
    /// Ports of `inter_node_bytes_per_second` that the ranks of a node share. 1 if that is the rate of a whole node,
    /// `ranks_per_node` if every rank has a port of its own.
    pub inter_node_ports: usize,
    /// Bytes a second of a rank's own memory.
    pub memory_bytes_per_second: f64,
    /// How often a forward pass of the experts reads or writes the intermediate activations of its assignments, `F`
    /// elements each, beside its matrix products: activation function, permutation, copies. 0 if all is fused.
    pub elementwise_passes: f64,
    /// Seconds that each layer takes in each micro-batch whatever its size: launches, host synchronisation, routing.
    pub layer_overhead_seconds: f64,
    /// Seconds lost for each second that the experts of the most loaded rank take longer than the mean: 1 if ranks wait
    /// for nothing else. Measured runs lose a little more.
    pub straggler_factor: f64,
    /// As `elementwise_passes`, of the assignments' rows of `D` elements.
    #[serde(default)]
    pub row_passes: f64,
    /// How often forward and backward together read or write the parameters of a rank's slots beside all else.
    #[serde(default)]
    pub weight_passes: f64,
    /// How often attention's forward pass reads or writes rows of `D` elements of all tokens beside its products: normalisation,
    /// residuals, rotation.
    #[serde(default)]
    pub attention_passes: f64,
    /// FLOP/s of attention's scores and values; 0 for the rate of all other products.
    #[serde(default)]
    pub attention_flops_per_second: f64,
    /// Bytes a second that a rank sends or receives within its node behind compute; 0 for the rate of tokens.
    #[serde(default)]
    pub background_bytes_per_second: f64,
    /// Share of the time of communication behind compute that compute loses to it: NCCL's kernels take multiprocessors.
    #[serde(default)]
    pub background_slowdown: f64,
    /// Seconds of an All-to-All for each other rank, whatever the bytes.
    #[serde(default)]
    pub peer_latency_seconds: f64,
    /// Seconds of a layer and micro-batch that planning of rows by rank takes.
    #[serde(default)]
    pub row_planning_seconds: f64,
    /// FLOP/s that a rank's data sheet promises, for shares of it; 0 if unknown.
    #[serde(default)]
    pub peak_flops_per_second: f64,
    /// Bytes of a rank's memory; unknown if 0.
    #[serde(default)]
    pub memory_bytes_per_rank: f64,
    /// Share of it that tensors may take. The rest is what an allocator loses and keeps, kernels and workspaces.
    #[serde(default = "usable_memory_share")]
    pub usable_memory_share: f64,
}

/// By the one run that has both numbers: 62.2 GiB of tensors (by `memory`'s formulae) in 69.2 GiB that LibTorch had reserved.
fn usable_memory_share() -> f64 {
    0.9
}

impl ClusterSpec {
    /// Checks that all settings make sense.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] naming the first that does not.
    pub fn check(&self) -> Result<(), SimulatorError> {
        at_least_one("nodes", self.nodes)?;
        at_least_one("ranks_per_node", self.ranks_per_node)?;
        if self.nodes * self.ranks_per_node > MAX_RANKS {
            let expected = format!("at most {MAX_RANKS} ranks in all");
            return Err(SimulatorError::setting("nodes", self.nodes, expected));
        }
        self.constants.check()?;
        if !(1..=self.ranks_per_node).contains(&self.inter_node_ports) {
            let expected = format!("1 to ranks_per_node = {}", self.ranks_per_node);
            return Err(SimulatorError::setting("inter_node_ports", self.inter_node_ports, expected));
        }
        positive("memory_bytes_per_second", self.memory_bytes_per_second)?;
        for (field, value) in [
            ("elementwise_passes", self.elementwise_passes),
            ("layer_overhead_seconds", self.layer_overhead_seconds),
            ("straggler_factor", self.straggler_factor),
            ("memory_bytes_per_rank", self.memory_bytes_per_rank),
            ("row_passes", self.row_passes),
            ("weight_passes", self.weight_passes),
            ("attention_passes", self.attention_passes),
            ("attention_flops_per_second", self.attention_flops_per_second),
            ("background_bytes_per_second", self.background_bytes_per_second),
            ("background_slowdown", self.background_slowdown),
            ("peer_latency_seconds", self.peer_latency_seconds),
            ("row_planning_seconds", self.row_planning_seconds),
            ("peak_flops_per_second", self.peak_flops_per_second),
        ] {
            if !value.is_finite() || value < 0.0 {
                return Err(SimulatorError::setting(field, value, "a finite number, not negative"));
            }
        }
        if !(0.01..=1.0).contains(&self.usable_memory_share) {
            return Err(SimulatorError::setting("usable_memory_share", self.usable_memory_share, "from 0.01 to 1"));
        }
        Ok(())
    }

    /// Bytes of a rank's memory that tensors may take, if it is known.
    pub fn usable_memory_bytes(&self) -> Option<u64> {
        let bytes = self.memory_bytes_per_rank * self.usable_memory_share;
        (bytes >= 1.0).then_some(bytes as u64)
    }

    /// Bytes a second of what compute hides, within a node.
    pub(super) fn background_rate(&self) -> f64 {
        match self.background_bytes_per_second {
            0.0 => self.constants.intra_node_bytes_per_second,
            rate => rate,
        }
    }

    /// World size `N`.
    pub fn world_size(&self) -> usize {
        self.nodes * self.ranks_per_node
    }

    /// The ranks and their nodes.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Planner`] if there are none.
    pub fn topology(&self) -> Result<Topology, SimulatorError> {
        Ok(Topology::uniform(self.world_size(), self.ranks_per_node)?)
    }

    /// Bytes a second of all of a node's ports to other nodes.
    pub fn node_bytes_per_second(&self) -> f64 {
        self.constants.inter_node_bytes_per_second * self.inter_node_ports as f64
    }
}

pub(super) fn positive(field: &'static str, value: f64) -> Result<(), SimulatorError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(SimulatorError::setting(field, value, "a finite number above 0"))
}

pub(super) fn at_least_one(field: &'static str, value: usize) -> Result<(), SimulatorError> {
    // The upper limit keeps products of sizes inside 64 bits.
    if (1..=1 << 30).contains(&value) {
        return Ok(());
    }
    Err(SimulatorError::setting(field, value, "a whole number from 1 to 2^30"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::model::tests::small_cluster;

    #[test]
    fn bad_settings_are_named() {
        small_cluster().check().unwrap();
        let bad = |change: fn(&mut ClusterSpec)| {
            let mut cluster = small_cluster();
            change(&mut cluster);
            cluster.check().unwrap_err().field().unwrap()
        };
        assert_eq!(bad(|c| c.nodes = 0), "nodes");
        assert_eq!(bad(|c| c.inter_node_ports = 99), "inter_node_ports");
        assert_eq!(bad(|c| c.straggler_factor = f64::NAN), "straggler_factor");
        assert_eq!(bad(|c| c.constants.seconds_per_assignment = -1.0), "seconds_per_assignment");
        assert_eq!(bad(|c| c.constants.hidden_size = 0), "hidden_size");
    }

    #[test]
    fn the_papers_constant_is_three_quarters_of_an_a100() {
        let paper = CostConstants::paper_mixtral_8x7b();
        let constants = MeasuredConstants {
            seconds_per_assignment: paper.seconds_per_assignment,
            bytes_per_token: paper.bytes_per_token,
            intra_node_bytes_per_second: paper.intra_node_bytes_per_second,
            inter_node_bytes_per_second: paper.inter_node_bytes_per_second,
            hidden_size: 4096,
            intermediate_size: 14336,
        };
        assert!((constants.matmul_flops_per_second() / 312e12 - 0.76).abs() < 0.01);
        let json = serde_json::to_string(&constants).unwrap();
        assert_eq!(serde_json::from_str::<CostConstants>(&json).unwrap(), paper);
    }
}
