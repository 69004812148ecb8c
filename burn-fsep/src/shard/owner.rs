use burn::module::ParamId;

use super::mix;
use crate::burn_compat::{param_tag, tagged_param};

/// A new id for a parameter that is `rank`'s part of `world_size`.
///
/// All ranks' parts have the same name and, mostly, the same shape. Of what Burn's records keep of a parameter, the id is
/// all that can tell whose part it is.
pub(crate) fn shard_id(rank: usize, world_size: usize) -> ParamId {
    tagged_param(owner(rank, world_size))
}

/// Whether an id is of `rank`'s part of `world_size`.
fn is_shard_of(id: ParamId, rank: usize, world_size: usize) -> bool {
    param_tag(id) == owner(rank, world_size)
}

/// The rank other than `rank` whose part of `world_size` an id is. `None` also for ids that were not made for shards, but
/// for `world_size` in four billion.
pub(crate) fn foreign_owner(id: ParamId, rank: usize, world_size: usize) -> Option<usize> {
    if is_shard_of(id, rank, world_size) {
        return None;
    }
    (0..world_size).find(|&other| is_shard_of(id, other, world_size))
}

fn owner(rank: usize, world_size: usize) -> u32 {
    mix(mix(0, world_size as u64), rank as u64) as u32
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_are_unique_and_tell_rank_and_world_size() {
        let ranks: Vec<_> = [1, 2, 3, 4, 8, 64].iter().flat_map(|&n| (0..n).map(move |rank| (rank, n))).collect();
        for &(rank, ranks_of) in &ranks {
            let id = shard_id(rank, ranks_of);
            let owners: Vec<_> = ranks.iter().filter(|(rank, n)| is_shard_of(id, *rank, *n)).collect();
            assert_eq!(owners, [&(rank, ranks_of)]);
            assert_eq!(foreign_owner(id, rank, ranks_of), None);
            assert_eq!(foreign_owner(id, rank + 1, ranks_of), Some(rank));
            assert_eq!(foreign_owner(id, rank, ranks_of + 1), None, "a number of ranks that is not among these");
        }
        let ids: HashSet<_> = (0..1000).map(|_| shard_id(1, 4)).collect();
        assert_eq!(ids.len(), 1000);
    }
}
