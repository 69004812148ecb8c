use super::{ClusterSpec, ModelSpec, SimulatorError, WeightPlacement};

/// Which ranks share the experts, and who keeps the optimizer's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupSpec {
    /// Ranks `M` that share the experts, neighbours. There are `W / M` replicas of such groups.
    pub ranks: usize,
    /// Optimizer state is cut: of replicated parameters over all ranks, of shards over their replicas (ZeRO-1).
    pub zero: bool,
}

impl GroupSpec {
    /// Checks that groups are parts of a node, or made of whole nodes, and hold the model's experts.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] if not.
    pub fn check(&self, cluster: &ClusterSpec, model: &ModelSpec) -> Result<(), SimulatorError> {
        let (world, node) = (cluster.world_size(), cluster.ranks_per_node);
        let fits = self.ranks > 0
            && world.is_multiple_of(self.ranks)
            && (self.ranks.is_multiple_of(node) || node.is_multiple_of(self.ranks));
        if !fits {
            let expected = format!("a divisor of the {world} ranks, and a divisor or multiple of the {node} of a node");
            return Err(SimulatorError::setting("groups", self.ranks, expected));
        }
        if model.weights == WeightPlacement::Owned && (self.ranks != world || self.zero) {
            let expected = "no groups and no ZeRO with owned experts: they are one group";
            return Err(SimulatorError::setting("groups", self.ranks, expected));
        }
        model.check_slots(self.ranks)
    }

    /// One group as a cluster.
    pub(super) fn cluster(&self, cluster: &ClusterSpec) -> ClusterSpec {
        let ranks_per_node = self.ranks.min(cluster.ranks_per_node);
        ClusterSpec {
            nodes: self.ranks / ranks_per_node,
            ranks_per_node,
            inter_node_ports: cluster.inter_node_ports.min(ranks_per_node),
            ..cluster.clone()
        }
    }

    /// Sizes `M` that a cluster of a model can have, powers of two times a node's divisors: from 1 to all ranks.
    pub fn sizes(cluster: &ClusterSpec, model: &ModelSpec) -> Vec<usize> {
        let mut sizes: Vec<usize> = std::iter::successors(Some(1usize), |ranks| ranks.checked_mul(2))
            .take_while(|&ranks| ranks <= cluster.world_size())
            .chain([cluster.ranks_per_node, cluster.world_size()])
            .filter(|&ranks| Self { ranks, zero: false }.check(cluster, model).is_ok())
            .collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::model::tests::{small_cluster, small_model};

    #[test]
    fn groups_fit_nodes() {
        let check = |ranks| GroupSpec { ranks, zero: false }.check(&small_cluster(), &small_model());
        [4, 8].into_iter().for_each(|ranks| check(ranks).unwrap());
        for bad in [0, 3, 16] {
            assert_eq!(check(bad).unwrap_err().field(), Some("groups"), "{bad}");
        }
        assert_eq!(check(2).unwrap_err().field(), Some("slots_per_rank"), "4 slots for 8 experts");
        let any = ModelSpec { slots_per_rank: 0, ..small_model() };
        assert_eq!(GroupSpec::sizes(&small_cluster(), &any), [1, 2, 4, 8]);
        let owned = ModelSpec { weights: WeightPlacement::Owned, ..small_model() };
        assert!(GroupSpec { ranks: 4, zero: false }.check(&small_cluster(), &owned).is_err());
    }
}
