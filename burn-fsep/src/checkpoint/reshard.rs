use std::ops::Range;

use crate::{moe::ExpertsInfo, ops::WeightStorage, shard::WholeExperts};

/// How the experts of one layer are sharded over ranks. All lengths in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sharding {
    pub storage: WeightStorage,
    /// World size `N`.
    pub ranks: usize,
    /// Experts `E`.
    pub experts: usize,
    /// Parameters `P` of an expert.
    pub params: usize,
}

/// A run of elements that two tensors of different shardings share: where it stands in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overlap {
    pub from: usize,
    pub to: usize,
    pub len: usize,
}

impl Overlap {
    /// What of it goes to these elements of the target, counted from their first.
    pub fn within(&self, range: &Range<usize>) -> Option<Self> {
        let (start, end) = (self.to.max(range.start), (self.to + self.len).min(range.end));
        (start < end).then(|| Self { from: self.from + start - self.to, to: start - range.start, len: end - start })
    }
}

impl Sharding {
    pub fn new(info: &ExpertsInfo, ranks: usize) -> Self {
        Self { storage: info.storage, ranks, experts: info.num_experts, params: info.shape.num_params() }
    }

    /// All experts whole in one tensor `[E, P]`.
    pub fn whole(info: &ExpertsInfo) -> Self {
        Self { storage: WeightStorage::Resident, ..Self::new(info, 1) }
    }

    /// Whole experts in runs, as [`WholeExperts`] gives them to ranks: `[ceil(E / ranks), P]`, the last of which may be none's.
    pub fn runs(info: &ExpertsInfo, ranks: usize) -> Self {
        let experts = WholeExperts { experts: info.num_experts, ranks }.run() * ranks;
        Self { storage: WeightStorage::Resident, experts, ..Self::new(info, ranks) }
    }

    /// Shape of each rank's tensor: `[E, S]` or `[E / N, P]`.
    pub fn shape(&self) -> [usize; 2] {
        match self.storage {
            WeightStorage::Sharded => [self.experts, self.params.div_ceil(self.ranks)],
            WeightStorage::Resident => [self.experts / self.ranks, self.params],
        }
    }

    /// The experts whose parameters stand in the rows of a rank's tensor.
    pub fn experts_of(&self, rank: usize) -> Range<usize> {
        match self.storage {
            WeightStorage::Sharded => 0..self.experts,
            WeightStorage::Resident => {
                let owned = self.experts / self.ranks;
                rank * owned..(rank + 1) * owned
            }
        }
    }

    /// Which of an expert's parameters stand in each row of a rank's tensor; padding is left out.
    pub fn params_of(&self, rank: usize) -> Range<usize> {
        match self.storage {
            WeightStorage::Sharded => {
                let len = self.params.div_ceil(self.ranks);
                let start = (rank * len).min(self.params);
                start..(start + len).min(self.params)
            }
            WeightStorage::Resident => 0..self.params,
        }
    }

    /// What rank `rank` of this sharding has that rank `to_rank` of another one needs, in the order of its place in the
    /// former's tensor. Padding is never copied, except where nothing changes.
    pub fn overlaps(&self, rank: usize, to: &Sharding, to_rank: usize) -> Vec<Overlap> {
        let [rows, row_len] = self.shape();
        if self == to {
            let all = Overlap { from: 0, to: 0, len: rows * row_len };
            return if rank == to_rank && all.len > 0 { vec![all] } else { Vec::new() };
        }
        let to_row_len = to.shape()[1];
        let (ours, theirs) = (self.params_of(rank), to.params_of(to_rank));
        let (start, end) = (ours.start.max(theirs.start), ours.end.min(theirs.end));
        let (experts, wanted) = (self.experts_of(rank), to.experts_of(to_rank));
        let shared = experts.start.max(wanted.start)..experts.end.min(wanted.end);
        if start >= end {
            return Vec::new();
        }
        shared
            .map(|expert| Overlap {
                from: (expert - experts.start) * row_len + start - ours.start,
                to: (expert - wanted.start) * to_row_len + start - theirs.start,
                len: end - start,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every rank's tensor of experts whose parameters are numbers from 1, none twice.
    fn tensors(sharding: &Sharding) -> Vec<Vec<u32>> {
        let [rows, len] = sharding.shape();
        let tensor = |rank: usize| {
            let mut values = vec![0; rows * len];
            for (row, expert) in sharding.experts_of(rank).enumerate() {
                for (i, param) in sharding.params_of(rank).enumerate() {
                    values[row * len + i] = (expert * sharding.params + param + 1) as u32;
                }
            }
            values
        };
        (0..sharding.ranks).map(tensor).collect()
    }

    #[test]
    fn any_sharding_becomes_any_other() {
        // 8 experts of 11 parameters: shards of most world sizes are padded, the last of 8 ranks has none but padding.
        let sharding = |storage, ranks| Sharding { storage, ranks, experts: 8, params: 11 };
        let sharded = [1, 2, 3, 4, 7, 8, 20].map(|ranks| sharding(WeightStorage::Sharded, ranks));
        let resident = [1, 2, 4, 8].map(|ranks| sharding(WeightStorage::Resident, ranks));
        let shardings: Vec<Sharding> = sharded.into_iter().chain(resident).collect();
        for from in &shardings {
            let sources = tensors(from);
            for to in &shardings {
                for (rank, expected) in tensors(to).into_iter().enumerate() {
                    let mut values = vec![0; expected.len()];
                    for (source, tensor) in sources.iter().enumerate() {
                        for Overlap { from, to, len } in from.overlaps(source, to, rank) {
                            assert!(values[to..to + len].iter().all(|&v| v == 0), "written twice");
                            values[to..to + len].copy_from_slice(&tensor[from..from + len]);
                        }
                    }
                    assert_eq!(values, expected, "{from:?} to rank {rank} of {to:?}");
                }
            }
        }
    }
}
