use std::{collections::BTreeMap, sync::Arc};

use burn::tensor::Bytes;

use super::group_ranks::GroupRanks;
use crate::comm::{Block, CommError};

/// Names a collective: communicator and number on it.
pub(in crate::comm) type RoundKey = (u64, u64);

/// A rank's part of a collective.
#[derive(Debug, Clone)]
pub(in crate::comm) struct Part {
    /// What the rank is doing, compared across ranks.
    pub signature: String,
    pub data: Arc<Bytes>,
    /// What of the data is for each rank of the group, or, of a part that was sent to one rank, for that one.
    pub blocks: Vec<Vec<Block>>,
}

impl Part {
    /// The blocks for a rank of the group.
    pub fn blocks_for(&self, rank: usize) -> impl Iterator<Item = &[u8]> {
        let blocks = if let [only] = self.blocks.as_slice() { only } else { &self.blocks[rank] };
        blocks.iter().map(|block| &self.data[block.range()])
    }
}

/// A collective that some rank has reached. Ranks are those of the world.
pub(super) struct Round {
    /// Whose parts it waits for. `None` as long as no rank of this process has come: those of others may be ahead, with a group
    /// that is not known here yet.
    group: Option<Arc<GroupRanks>>,
    /// By rank.
    parts: BTreeMap<usize, Arc<Part>>,
    /// The rank whose part came first.
    first: usize,
    /// A rank that does something else than the first one.
    pub differs: Option<usize>,
    /// Ranks of this process that have the parts, or do without.
    pub done: usize,
}

impl Round {
    /// The round that `first` has reached as the first.
    pub fn new(first: usize) -> Self {
        Self { group: None, parts: BTreeMap::new(), first, differs: None, done: 0 }
    }

    /// A rank of this process has come, which knows the group.
    ///
    /// # Errors
    ///
    /// A rank that has brought a part and is not of the group.
    pub fn join(&mut self, group: &Arc<GroupRanks>) -> Result<(), usize> {
        if self.group.is_none() {
            self.group = Some(group.clone());
        }
        self.parts.keys().find(|&&rank| !group.contains(rank)).map_or(Ok(()), |&stranger| Err(stranger))
    }

    /// Whether a part of this rank may come.
    pub fn lacks(&self, rank: usize) -> bool {
        self.group.as_ref().is_none_or(|group| group.contains(rank)) && !self.parts.contains_key(&rank)
    }

    pub fn insert(&mut self, rank: usize, part: Part) {
        if self.parts.get(&self.first).is_some_and(|first| first.signature != part.signature) {
            self.differs.get_or_insert(rank);
        }
        self.parts.insert(rank, Arc::new(part));
    }

    pub fn part(&self, rank: usize) -> Option<&Arc<Part>> {
        self.parts.get(&rank)
    }

    /// The group of a round in which all its ranks' parts are.
    pub fn complete(&self) -> Option<&Arc<GroupRanks>> {
        self.group.as_ref().filter(|group| group.len() == self.parts.len())
    }

    /// All parts, in the group's order, once the round is complete. Shape `[N]`.
    pub fn all_parts(&self) -> Option<Vec<Arc<Part>>> {
        self.complete()?.iter().map(|rank| self.parts.get(&rank).cloned()).collect()
    }

    /// The ranks whose parts have not come, in ascending order.
    pub fn missing(&self) -> Vec<usize> {
        let group = self.group.iter().flat_map(|group| group.iter());
        let mut missing: Vec<_> = group.filter(|rank| !self.parts.contains_key(rank)).collect();
        missing.sort_unstable();
        missing
    }

    /// How a rank that has added its part finds that another one does something else.
    pub fn mismatch(&self, sequence: u64, rank: usize) -> Option<CommError> {
        let signature = |rank: usize| Some(self.parts.get(&rank)?.signature.clone());
        let (ours, differs) = (signature(rank)?, self.differs?);
        let peer =
            [self.first, differs].into_iter().find(|&peer| signature(peer).is_some_and(|theirs| theirs != ours))?;
        Some(CommError::mismatch(sequence, rank, peer, [ours, signature(peer)?]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(signature: &str) -> Part {
        Part { signature: signature.into(), data: Arc::new(Bytes::from_elems(Vec::<u8>::new())), blocks: vec![] }
    }

    #[test]
    fn parts_are_those_of_the_group_in_its_order() {
        let group = Arc::new(GroupRanks::new(vec![5, 1, 7]));
        // Of another process, ahead of this one.
        let mut round = Round::new(7);
        round.insert(7, part("7"));
        assert!(round.complete().is_none() && round.missing().is_empty() && round.lacks(3));
        round.join(&group).unwrap();
        assert!(!round.lacks(3) && !round.lacks(7) && round.lacks(5));
        assert_eq!(round.missing(), [1, 5]);
        round.insert(1, part("1"));
        round.insert(5, part("5"));
        let parts = round.all_parts().unwrap();
        assert_eq!(parts.iter().map(|part| part.signature.as_str()).collect::<Vec<_>>(), ["5", "1", "7"]);
        let CommError::Mismatch { rank, peer, .. } = round.mismatch(0, 5).unwrap() else { panic!("no mismatch") };
        assert_eq!((rank, peer), (5, 7));
    }

    #[test]
    fn a_stranger_is_found() {
        let mut round = Round::new(2);
        round.insert(2, part("test"));
        assert_eq!(round.join(&Arc::new(GroupRanks::new(vec![0, 1]))), Err(2));
    }
}
