use std::collections::HashSet;

/// The ranks of a group, by the numbers that they have in the world: those are equal in all groups of a job.
#[derive(Debug)]
pub(in crate::comm) struct GroupRanks {
    /// In the group's order. Shape `[N]`.
    in_order: Vec<usize>,
    members: HashSet<usize>,
}

impl GroupRanks {
    pub fn new(in_order: Vec<usize>) -> Self {
        let members = in_order.iter().copied().collect();
        Self { in_order, members }
    }

    pub fn len(&self) -> usize {
        self.in_order.len()
    }

    /// World ranks in the group's order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.in_order.iter().copied()
    }

    pub fn contains(&self, world_rank: usize) -> bool {
        self.members.contains(&world_rank)
    }

    /// The world rank of the group's rank `rank`.
    pub fn world_rank(&self, rank: usize) -> usize {
        self.in_order[rank]
    }
}
