use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Serialize;

use crate::{PlannerError, RoutingCounts, Topology};

/// An expert layout `A[r, c]`: the expert that slot `c` of rank `r` holds. Shape `[N, C]`.
///
/// A layout is always valid: every expert has at least one replica, no expert stands twice on one rank, every slot
/// is filled.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Layout {
    num_ranks: usize,
    slots_per_rank: usize,
    num_experts: usize,
    /// Row-major `[N, C]`.
    slots: Vec<u32>,
    /// Ranks holding each expert, ascending, one expert after the other. Shape `[N * C]`.
    holders: Vec<u32>,
    /// Where each expert's holders start. Shape `[E + 1]`.
    holder_starts: Vec<u32>,
}

impl Layout {
    /// Checks that slots can be filled at all: `E <= N * C` and `C <= E`.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`], [`PlannerError::TooFewSlots`] or [`PlannerError::TooManySlots`].
    pub fn check_shape(num_ranks: usize, slots_per_rank: usize, num_experts: usize) -> Result<(), PlannerError> {
        for (what, value) in
            [("number of ranks", num_ranks), ("slots per rank", slots_per_rank), ("number of experts", num_experts)]
        {
            if value == 0 {
                return Err(PlannerError::Zero { what });
            }
        }
        if num_ranks.saturating_mul(slots_per_rank) < num_experts {
            return Err(PlannerError::TooFewSlots { ranks: num_ranks, slots_per_rank, experts: num_experts });
        }
        if slots_per_rank > num_experts {
            return Err(PlannerError::TooManySlots { slots_per_rank, experts: num_experts });
        }
        Ok(())
    }

    /// A layout from a row-major `[N, C]` table of experts.
    ///
    /// # Errors
    ///
    /// A [`PlannerError`] naming the first broken promise: shape, unknown expert, an expert twice on a rank, an
    /// expert without replica.
    pub fn new(
        num_ranks: usize,
        slots_per_rank: usize,
        num_experts: usize,
        slots: Vec<u32>,
    ) -> Result<Self, PlannerError> {
        Self::check_shape(num_ranks, slots_per_rank, num_experts)?;
        if slots.len() != num_ranks * slots_per_rank {
            return Err(PlannerError::Shape {
                what: format!("slots for {num_ranks} ranks x {slots_per_rank} slots"),
                expected: num_ranks * slots_per_rank,
                actual: slots.len(),
            });
        }
        let mut holder_starts = vec![0u32; num_experts + 1];
        let mut seen_on = vec![usize::MAX; num_experts];
        for (rank, row) in slots.chunks_exact(slots_per_rank).enumerate() {
            for (slot, &expert) in row.iter().enumerate() {
                let expert = expert as usize;
                if expert >= num_experts {
                    return Err(PlannerError::UnknownExpert { rank, slot, expert, experts: num_experts });
                }
                if seen_on[expert] == rank {
                    return Err(PlannerError::DuplicateExpert { rank, expert });
                }
                seen_on[expert] = rank;
                holder_starts[expert + 1] += 1;
            }
        }
        if let Some(expert) = (0..num_experts).find(|&e| holder_starts[e + 1] == 0) {
            return Err(PlannerError::MissingExpert { expert });
        }
        for expert in 0..num_experts {
            holder_starts[expert + 1] += holder_starts[expert];
        }
        let mut next = holder_starts.clone();
        let mut holders = vec![0u32; slots.len()];
        for (i, &expert) in slots.iter().enumerate() {
            let at = &mut next[expert as usize];
            holders[*at as usize] = (i / slots_per_rank) as u32;
            *at += 1;
        }
        Ok(Self { num_ranks, slots_per_rank, num_experts, slots, holders, holder_starts })
    }

    /// A layout from one row of experts a rank.
    ///
    /// # Errors
    ///
    /// As [`Layout::new`]; [`PlannerError::Shape`] if rows differ in length.
    pub fn from_rows(num_experts: usize, rows: &[Vec<u32>]) -> Result<Self, PlannerError> {
        let slots_per_rank = rows.first().map_or(0, Vec::len);
        for (rank, row) in rows.iter().enumerate() {
            if row.len() != slots_per_rank {
                return Err(PlannerError::Shape {
                    what: format!("slots of rank {rank}"),
                    expected: slots_per_rank,
                    actual: row.len(),
                });
            }
        }
        Self::new(rows.len(), slots_per_rank, num_experts, rows.concat())
    }

    /// The layout of static expert parallelism: slots are filled with experts `0, 1, .., E - 1` round and round,
    /// so that each group of `E / C` neighbouring ranks holds every expert once.
    ///
    /// # Errors
    ///
    /// As [`Layout::check_shape`].
    pub fn static_ep(num_ranks: usize, slots_per_rank: usize, num_experts: usize) -> Result<Self, PlannerError> {
        Self::check_shape(num_ranks, slots_per_rank, num_experts)?;
        let slots = (0..num_ranks * slots_per_rank).map(|i| (i % num_experts) as u32).collect();
        Self::new(num_ranks, slots_per_rank, num_experts, slots)
    }

    /// World size `N`.
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// Slots a rank `C`.
    pub fn slots_per_rank(&self) -> usize {
        self.slots_per_rank
    }

    /// Experts `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// `A[r, :]`, the experts of a rank by slot. Shape `[C]`.
    ///
    /// # Panics
    ///
    /// If `rank >= N`.
    pub fn experts_of(&self, rank: usize) -> &[u32] {
        &self.slots[rank * self.slots_per_rank..(rank + 1) * self.slots_per_rank]
    }

    /// The slot in which a rank holds an expert, if it does.
    ///
    /// # Panics
    ///
    /// If `rank >= N`.
    pub fn slot_of(&self, rank: usize, expert: usize) -> Option<usize> {
        self.experts_of(rank).iter().position(|&e| e as usize == expert)
    }

    /// The ranks that hold an expert, ascending. Shape `[R_e]`.
    ///
    /// # Panics
    ///
    /// If `expert >= E`.
    pub fn ranks_of(&self, expert: usize) -> &[u32] {
        &self.holders[self.holder_starts[expert] as usize..self.holder_starts[expert + 1] as usize]
    }

    /// [`Layout::ranks_of`] of all experts, one after the other: an index is an edge (expert, holder). Shape `[N * C]`.
    pub(crate) fn holders(&self) -> &[u32] {
        &self.holders
    }

    /// Replicas `R_e` of an expert.
    ///
    /// # Panics
    ///
    /// If `expert >= E`.
    pub fn replicas(&self, expert: usize) -> usize {
        self.ranks_of(expert).len()
    }

    /// The whole table, row-major. Shape `[N, C]`.
    pub fn as_slice(&self) -> &[u32] {
        &self.slots
    }

    /// Experts that each rank holds here but not in `previous`. The order of slots on a rank does not count. Shape `[N]`.
    pub fn received_slots(&self, previous: &Layout) -> Vec<usize> {
        let received = |rank| {
            let held = if rank < previous.num_ranks { previous.experts_of(rank) } else { &[] };
            self.experts_of(rank).iter().filter(|expert| !held.contains(expert)).count()
        };
        (0..self.num_ranks).map(received).collect()
    }

    /// [`Layout::received_slots`] summed over ranks: what a runtime that keeps restored weights has to restore anew.
    pub fn moved_slots(&self, previous: &Layout) -> usize {
        self.received_slots(previous).into_iter().sum()
    }

    /// A hash that is equal on all ranks and in all processes of one build: ranks compare it to catch diverging
    /// layouts.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// Checks that counts and topology are of this layout's sizes.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Shape`] naming the size that differs.
    pub fn check_fits(&self, topology: &Topology, counts: &RoutingCounts) -> Result<(), PlannerError> {
        for (what, expected, actual) in [
            ("ranks of the topology", self.num_ranks, topology.world_size()),
            ("ranks of the routing counts", self.num_ranks, counts.num_ranks()),
            ("experts of the routing counts", self.num_experts, counts.num_experts()),
        ] {
            if expected != actual {
                return Err(PlannerError::Shape { what: what.into(), expected, actual });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookups() {
        let layout = Layout::from_rows(3, &[vec![0, 1], vec![2, 0]]).unwrap();
        assert_eq!(layout.ranks_of(0), [0, 1]);
        assert_eq!(layout.slot_of(1, 0), Some(1));
        assert_eq!(layout.slot_of(1, 1), None);
        assert_eq!(layout.replicas(2), 1);
    }

    #[test]
    fn broken_layouts_are_typed_errors() {
        use PlannerError as P;
        assert!(matches!(Layout::from_rows(3, &[vec![0, 1]]), Err(P::TooFewSlots { .. })));
        assert!(matches!(Layout::from_rows(1, &[vec![0, 0]]), Err(P::TooManySlots { .. })));
        assert!(matches!(Layout::from_rows(2, &[vec![0, 0]]), Err(P::DuplicateExpert { rank: 0, expert: 0 })));
        assert!(matches!(Layout::from_rows(2, &[vec![0], vec![0]]), Err(P::MissingExpert { expert: 1 })));
        assert!(matches!(Layout::from_rows(2, &[vec![0], vec![2]]), Err(P::UnknownExpert { .. })));
        assert!(matches!(Layout::from_rows(2, &[vec![0, 1], vec![0]]), Err(P::Shape { .. })));
        assert!(matches!(Layout::from_rows(2, &[]), Err(P::Zero { .. })));
    }

    #[test]
    fn sizes_beyond_any_machine_are_errors() {
        assert!(matches!(Layout::check_shape(2, usize::MAX, 3), Err(PlannerError::TooManySlots { .. })));
    }

    #[test]
    fn moved_slots_ignore_the_order_within_a_rank() {
        let a = Layout::from_rows(3, &[vec![0, 1], vec![2, 0]]).unwrap();
        let b = Layout::from_rows(3, &[vec![1, 0], vec![2, 1]]).unwrap();
        assert_eq!(b.moved_slots(&a), 1);
        assert_eq!(a.moved_slots(&a), 0);
    }

    #[test]
    fn static_ep_covers_every_expert_in_each_group() {
        let layout = Layout::static_ep(8, 2, 8).unwrap();
        assert_eq!(layout.experts_of(1), [2, 3]);
        assert_eq!(layout.ranks_of(7), [3, 7]);
    }
}
