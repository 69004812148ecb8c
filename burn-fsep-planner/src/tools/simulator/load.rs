use super::{ClusterSpec, ModelSpec, SimulatorError};
use crate::{Topology, dispatch::DispatchPlan};

/// How unevenly a layer's tokens fall, in units of the mean assignments of a rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerLoad {
    /// Assignments of the most loaded rank: imbalance, 1.0 is perfect.
    pub max_over_mean: f64,
    /// Assignments on the busiest port within a node: sent or received by one rank.
    pub intra_node: f64,
    /// Assignments on the busiest node's ports to other nodes: sent or received by all its ranks.
    pub inter_node: f64,
}

impl LayerLoad {
    /// The load under a dispatch plan. A plan without tokens is balanced.
    pub fn of_plan(topology: &Topology, plan: &DispatchPlan) -> Self {
        let mut within = vec![[0u64; 2]; topology.world_size()];
        let mut between = vec![[0u64; 2]; topology.num_nodes()];
        let mut total = 0u64;
        for (source, _, share) in plan.iter() {
            let (rank, tokens) = (share.rank as usize, u64::from(share.tokens));
            total += tokens;
            if !topology.same_node(source, rank) {
                between[topology.node_of(source)][0] += tokens;
                between[topology.node_of(rank)][1] += tokens;
            } else if source != rank {
                within[source][0] += tokens;
                within[rank][1] += tokens;
            }
        }
        let busiest = |ports: &[[u64; 2]]| ports.iter().flatten().copied().max().unwrap_or(0) as f64;
        let mean = total.max(1) as f64 / topology.world_size() as f64;
        Self {
            max_over_mean: plan.max_over_mean(),
            intra_node: busiest(&within) / mean,
            inter_node: busiest(&between) / mean,
        }
    }

    /// The load of which only the imbalance is known: tokens go to the nearest group of ranks that together hold every
    /// expert once, and the most loaded rank receives in proportion to its load.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] if the imbalance is below 1 or more than the world size, which no load can be.
    pub fn of_imbalance(cluster: &ClusterSpec, model: &ModelSpec, max_over_mean: f64) -> Result<Self, SimulatorError> {
        let ranks = cluster.world_size() as f64;
        if !(1.0..=ranks).contains(&max_over_mean) {
            let expected = format!("from 1 (balanced) to the world size {ranks}");
            return Err(SimulatorError::setting("imbalance", max_over_mean, expected));
        }
        let held = model.slots(cluster.world_size()) as f64 / model.experts as f64;
        let away = (1.0 - held * cluster.ranks_per_node as f64).max(0.0);
        Ok(Self {
            max_over_mean,
            intra_node: (1.0 - held - away).max(0.0) * max_over_mean,
            // Nodes add up the loads of their ranks, so they are taken as balanced.
            inter_node: away * cluster.ranks_per_node as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Layout, RoutingCounts,
        dispatch::{Dispatcher, EvenSplit},
        tools::simulator::model::tests::{small_cluster, small_model},
    };

    #[test]
    fn ports_of_a_plan() {
        let topology = Topology::uniform(4, 2).unwrap();
        let layout = Layout::from_rows(4, &[vec![0], vec![1], vec![2], vec![3]]).unwrap();
        let rows = [vec![0, 30, 0, 0], vec![10, 0, 0, 20], vec![0, 0, 20, 0], vec![0, 0, 20, 0]];
        let counts = RoutingCounts::from_rows(&rows).unwrap();
        let mut plan = DispatchPlan::new();
        EvenSplit::new().dispatch(&topology, &layout, &counts, &mut plan).unwrap();
        let load = LayerLoad::of_plan(&topology, &plan);
        assert_eq!(load, LayerLoad { max_over_mean: 1.6, intra_node: 1.2, inter_node: 0.8 });
    }

    #[test]
    fn tokens_leave_the_node_only_when_it_lacks_experts() {
        let (cluster, model) = (small_cluster(), small_model());
        let whole = LayerLoad::of_imbalance(&cluster, &model, 2.0).unwrap();
        assert_eq!((whole.intra_node, whole.inter_node), (1.5, 0.0));
        let half = LayerLoad::of_imbalance(&cluster, &ModelSpec { slots_per_rank: 1, ..model.clone() }, 1.0).unwrap();
        assert_eq!((half.intra_node, half.inter_node), (0.375, 2.0));
        for bad in [0.9, 9.0, f64::NAN] {
            assert!(LayerLoad::of_imbalance(&cluster, &model, bad).is_err(), "{bad}");
        }
    }
}
