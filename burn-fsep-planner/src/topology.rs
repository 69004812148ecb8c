use serde::{Deserialize, Serialize};

use crate::PlannerError;

/// Which node each rank stands on: ranks are numbered node by node.
///
/// Nodes may have different numbers of ranks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Topology {
    /// First rank of each node, and `N` at the end.
    node_starts: Vec<usize>,
    /// Node of each rank. Shape `[N]`.
    node_of: Vec<usize>,
}

impl Topology {
    /// Nodes of the given numbers of ranks.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if there is no node or a node has no rank.
    pub fn new(ranks_per_node: &[usize]) -> Result<Self, PlannerError> {
        if ranks_per_node.is_empty() {
            return Err(PlannerError::Zero { what: "number of nodes" });
        }
        let mut node_starts = vec![0];
        let mut node_of = Vec::new();
        for (node, &ranks) in ranks_per_node.iter().enumerate() {
            if ranks == 0 {
                return Err(PlannerError::Zero { what: "ranks per node" });
            }
            node_of.extend(std::iter::repeat_n(node, ranks));
            node_starts.push(node_of.len());
        }
        Ok(Self { node_starts, node_of })
    }

    /// `world_size` ranks in nodes of `ranks_per_node`; the last node takes what remains.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if either number is zero.
    pub fn uniform(world_size: usize, ranks_per_node: usize) -> Result<Self, PlannerError> {
        if world_size == 0 {
            return Err(PlannerError::Zero { what: "world size" });
        }
        if ranks_per_node == 0 {
            return Err(PlannerError::Zero { what: "ranks per node" });
        }
        let mut nodes = vec![ranks_per_node; world_size / ranks_per_node];
        if !world_size.is_multiple_of(ranks_per_node) {
            nodes.push(world_size % ranks_per_node);
        }
        Self::new(&nodes)
    }

    /// All ranks on one node.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if `world_size` is zero.
    pub fn single_node(world_size: usize) -> Result<Self, PlannerError> {
        Self::uniform(world_size, world_size)
    }

    /// The nodes of some of the ranks alone, which are numbered anew.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] if there is no rank among them.
    pub fn part(&self, ranks: std::ops::Range<usize>) -> Result<Self, PlannerError> {
        let on_node = |node| {
            let all = self.ranks_of(node);
            all.end.min(ranks.end).saturating_sub(all.start.max(ranks.start))
        };
        Self::new(&(0..self.num_nodes()).map(on_node).filter(|&count| count > 0).collect::<Vec<_>>())
    }

    /// World size `N`.
    pub fn world_size(&self) -> usize {
        self.node_of.len()
    }

    /// Number of nodes.
    pub fn num_nodes(&self) -> usize {
        self.node_starts.len() - 1
    }

    /// The node of a rank.
    ///
    /// # Panics
    ///
    /// If `rank >= N`.
    pub fn node_of(&self, rank: usize) -> usize {
        self.node_of[rank]
    }

    /// The ranks of a node.
    ///
    /// # Panics
    ///
    /// If `node >= num_nodes()`.
    pub fn ranks_of(&self, node: usize) -> std::ops::Range<usize> {
        self.node_starts[node]..self.node_starts[node + 1]
    }

    /// Whether two ranks stand on the same node.
    ///
    /// # Panics
    ///
    /// If a rank is `>= N`.
    pub fn same_node(&self, a: usize, b: usize) -> bool {
        self.node_of[a] == self.node_of[b]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uneven_last_node() {
        let topology = Topology::uniform(10, 4).unwrap();
        assert_eq!(topology.num_nodes(), 3);
        assert_eq!(topology.ranks_of(2), 8..10);
        assert_eq!(topology.node_of(7), 1);
        assert!(topology.same_node(8, 9) && !topology.same_node(7, 8));
    }

    #[test]
    fn a_part_may_begin_in_the_middle_of_a_node() {
        let topology = Topology::uniform(12, 4).unwrap();
        assert_eq!(topology.part(4..8), Topology::new(&[4]));
        assert_eq!(topology.part(3..9), Topology::new(&[1, 4, 1]));
        assert_eq!(topology.part(0..12), Ok(topology.clone()));
        assert!(topology.part(5..5).is_err() && topology.part(12..14).is_err());
    }

    #[test]
    fn rejects_empty_nodes() {
        assert_eq!(Topology::new(&[2, 0]), Err(PlannerError::Zero { what: "ranks per node" }));
        assert!(Topology::new(&[]).is_err());
        assert!(Topology::uniform(0, 1).is_err());
        assert!(Topology::uniform(1, 0).is_err());
    }
}
