use std::{cmp::Reverse, ops::Range};

use crate::Layout;

/// Packs loads of experts that may be split into the slots of some ranks, none above a level, and keeps the experts that the
/// ranks hold where it can.
///
/// Splittable items in bins of equal size, each of at most `C` parts: Chung, Graham, Mao and Varghese, "Parallelism versus
/// memory allocation in pipelined router forwarding engines" (2006). Rank after rank gets at most `C` experts, all whole but
/// for one, which is split where the rank is full. As long as no more than `n * (C - 1) + 1` experts are left for `n` ranks,
/// that cannot fail: of the experts by load, some `C` neighbours sum up to a rank's level, the first `C - 1` of which do not
/// ("sliding window", Epstein and van Stee, "Improved results for a memory allocation problem", 2007), and what is left is
/// again of that kind, whichever experts were chosen. With two slots a rank this is Walker's alias method. Where there are
/// more experts, some rank may not fill up, and then there is no packing or none is found.
///
/// The freedom of choice goes to the experts that a rank holds already: a rank gets as few others as fill it up.
#[derive(Debug, Clone, Default)]
pub(crate) struct Packing {
    /// Load of each expert that is still to be placed. Shape `[E]`.
    rest: Vec<u64>,
    /// Experts that are still to be placed, also such as have no load but no other rank either, by load. Ascending.
    items: Vec<(u64, u32)>,
    /// Whether an expert is among the items. Shape `[E]`.
    is_item: Vec<bool>,
    /// How many of the ranks to come hold each expert. Shape `[E]`.
    to_come: Vec<u32>,
    /// The experts that the rank at hand keeps, and all that it gets.
    kept: Vec<u32>,
    chosen: Vec<u32>,
}

/// What to pack.
#[derive(Debug, Clone)]
pub(crate) struct Part<'a> {
    /// The ranks, in the order in which they choose.
    pub ranks: &'a [usize],
    /// The ranks among which tokens move, these included.
    pub group: Range<usize>,
    /// Load of a rank at most.
    pub level: u64,
    /// Experts at most that a rank gets and did not hold.
    pub most_new: usize,
}

/// What is left to do.
#[derive(Debug, Clone, Copy)]
struct Left {
    /// Ranks, the one at hand included.
    ranks: usize,
    /// Load.
    load: u64,
    /// Load of a rank at most.
    level: u64,
    /// Slots of a rank.
    slots: usize,
    /// Experts beyond `n * (C - 1) + 1` that there were from the start.
    excess: usize,
}

impl Left {
    /// Experts that so many ranks hold with certainty.
    fn capacity(self, ranks: usize) -> usize {
        if ranks == 0 { 0 } else { ranks * (self.slots - 1) + 1 + self.excess }
    }

    /// Load that the rank at hand has to take, for the others to hold the rest.
    fn least(self) -> u64 {
        self.load.saturating_sub((self.ranks as u64 - 1) * self.level)
    }
}

impl Packing {
    /// Rewrites the slots of `ranks` in `table`, shape `[N, C]`, so that they hold what they compute together now, none of them
    /// more than `level`, and none more than `most_new` experts that it does not hold now. Returns false if no such slots are
    /// found; then those in the table make no layout.
    ///
    /// `shares` is what each slot computes now, shape `[N, C]`. An expert that no rank of `group` but these holds stays with
    /// them even if it has no load.
    pub fn pack(&mut self, table: &mut [u32], layout: &Layout, shares: &[u64], part: Part<'_>) -> bool {
        let slots = layout.slots_per_rank();
        self.begin(layout, shares, &part);
        let load = self.items.iter().map(|(load, _)| load).sum();
        let mut left = Left { ranks: part.ranks.len(), load, level: part.level, slots, excess: 0 };
        left.excess = self.items.len().saturating_sub(left.capacity(left.ranks));
        if left.excess > 0 && part.ranks.len() < part.group.len() {
            return false;
        }
        for &rank in part.ranks {
            let row = &mut table[rank * slots..(rank + 1) * slots];
            row.copy_from_slice(layout.experts_of(rank));
            row.iter().for_each(|&expert| self.to_come[expert as usize] -= 1);
            if !self.choose(row, left, part.most_new) {
                return false;
            }
            left.load -= self.place(part.level);
            left.ranks -= 1;
            self.fill_in(row);
        }
        self.items.is_empty()
    }

    /// Collects what is to be placed.
    fn begin(&mut self, layout: &Layout, shares: &[u64], part: &Part<'_>) {
        let (experts, slots) = (layout.num_experts(), layout.slots_per_rank());
        self.rest.clear();
        self.rest.resize(experts, 0);
        self.to_come.clear();
        self.to_come.resize(experts, 0);
        for &rank in part.ranks {
            for (slot, &expert) in layout.experts_of(rank).iter().enumerate() {
                self.rest[expert as usize] += shares[rank * slots + slot];
                self.to_come[expert as usize] += 1;
            }
        }
        self.items.clear();
        self.is_item.clear();
        for expert in 0..experts {
            let holders = layout.ranks_of(expert);
            let [first, end] =
                [part.group.start, part.group.end].map(|at| holders.partition_point(|&r| (r as usize) < at));
            let is_here_only = self.to_come[expert] as usize == end - first;
            self.is_item.push(self.rest[expert] > 0 || is_here_only);
            if self.is_item[expert] {
                self.items.push((self.rest[expert], expert as u32));
            }
        }
        self.items.sort_unstable();
    }

    /// Chooses experts for the rank that holds `row`: keeps as many as can be. Leaves them in `chosen`, the one to split last.
    fn choose(&mut self, row: &[u32], left: Left, most_new: usize) -> bool {
        let mut own: Vec<u32> = row.iter().copied().filter(|&expert| self.is_item[expert as usize]).collect();
        // First those that no rank to come holds, then the large ones.
        own.sort_by_key(|&e| (self.to_come[e as usize], Reverse(self.rest[e as usize]), e));
        for keep in (0..=own.len()).rev() {
            self.kept.clear();
            self.kept.extend_from_slice(&own[..keep]);
            self.kept.sort_by_key(|&e| (self.rest[e as usize], e));
            let others = most_new.min(left.slots - keep);
            if self.complete(others, left) {
                return true;
            }
        }
        false
    }

    /// Completes `kept` with at most so many other experts.
    fn complete(&mut self, others: usize, left: Left) -> bool {
        let sum: u64 = self.kept.iter().map(|&e| self.rest[e as usize]).sum();
        self.chosen.clear();
        if sum >= left.level {
            // The small ones are enough, or smaller ones have to be got rid of beside them.
            let mut filled = 0;
            for &expert in &self.kept {
                self.chosen.push(expert);
                filled += self.rest[expert as usize];
                if filled >= left.level {
                    break;
                }
            }
            if self.is_allowed(left) {
                return true;
            }
            self.chosen.clear();
            let smallest = self.items.iter().map(|(_, e)| *e).filter(|e| !self.kept.contains(e)).take(others);
            self.chosen.extend(smallest);
            self.chosen.extend_from_slice(&self.kept);
            self.chosen.sort_by_key(|&e| (self.rest[e as usize], e));
            return self.is_allowed(left);
        }
        self.chosen.extend_from_slice(&self.kept);
        if self.is_allowed(left) {
            return true;
        }
        // The largest ones have to be split anyway: so few of them that slots stay as they are.
        let mut filled = sum;
        for &(load, expert) in self.items.iter().rev().filter(|(_, e)| !self.kept.contains(e)).take(others) {
            self.chosen.push(expert);
            filled += load;
            if filled >= left.level {
                break;
            }
        }
        self.is_allowed(left) || self.slide(sum, others, left)
    }

    /// Completes `kept`, of this load, with the first neighbours by load that fill the rank up, or with the largest.
    fn slide(&mut self, kept: u64, others: usize, left: Left) -> bool {
        let free: Vec<(u64, u32)> = self.items.iter().copied().filter(|(_, e)| !self.kept.contains(e)).collect();
        let width = others.min(free.len());
        let mut filled: u64 = kept + free[..width].iter().map(|(load, _)| load).sum::<u64>();
        let mut first = 0;
        while filled < left.level && first + width < free.len() {
            filled = filled + free[first + width].0 - free[first].0;
            first += 1;
        }
        self.chosen.clear();
        self.chosen.extend_from_slice(&self.kept);
        let mut filled = kept;
        for &(load, expert) in &free[first..first + width] {
            if filled >= left.level {
                break;
            }
            self.chosen.push(expert);
            filled += load;
        }
        self.is_allowed(left)
    }

    /// Whether the chosen experts fill the rank so that the others can hold the rest: all whole but the last.
    fn is_allowed(&self, left: Left) -> bool {
        let Some((&last, whole)) = self.chosen.split_last() else { return left.least() == 0 && self.is_small(0, left) };
        let sum: u64 = whole.iter().map(|&e| self.rest[e as usize]).sum();
        let all = sum + self.rest[last as usize];
        let placed = self.chosen.len() - usize::from(all > left.level);
        sum <= left.level && all.min(left.level) >= left.least() && self.is_small(placed, left)
    }

    /// Whether the ranks after this one hold what is left after so many experts are placed.
    fn is_small(&self, placed: usize, left: Left) -> bool {
        self.items.len() - placed <= left.capacity(left.ranks - 1)
    }

    /// Takes the chosen experts' load up to the level. Returns how much that is.
    fn place(&mut self, level: u64) -> u64 {
        let mut filled = 0;
        for &expert in &self.chosen {
            let rest = &mut self.rest[expert as usize];
            if let Ok(at) = self.items.binary_search(&(*rest, expert)) {
                self.items.remove(at);
            }
            let taken = (*rest).min(level - filled);
            filled += taken;
            *rest -= taken;
            self.is_item[expert as usize] = *rest > 0;
            if *rest > 0 {
                let item = (*rest, expert);
                let at = self.items.partition_point(|other| *other < item);
                self.items.insert(at, item);
            }
        }
        filled
    }

    /// Writes the chosen experts into a rank's slots, in place of such as are placed, then of such as will be.
    fn fill_in(&mut self, row: &mut [u32]) {
        for i in 0..self.chosen.len() {
            let new = self.chosen[i];
            if row.contains(&new) {
                continue;
            }
            let is_free = |expert: &u32| !self.chosen.contains(expert);
            let slot = (0..row.len()).filter(|&slot| is_free(&row[slot])).min_by_key(|&slot| {
                let expert = row[slot] as usize;
                (self.is_item[expert], self.to_come[expert] == 0, slot)
            });
            // There is one: at most as many experts were chosen as there are slots.
            if let Some(slot) = slot {
                row[slot] = new;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_cases::layouts;

    /// A layout, and what its slots compute.
    fn shared() -> impl Strategy<Value = (Layout, Vec<u64>)> {
        (1usize..10, 2usize..14)
            .prop_flat_map(|(ranks, experts)| (Just((ranks, experts)), experts.div_ceil(ranks)..=experts))
            .prop_flat_map(|((ranks, experts), slots)| {
                let share = prop_oneof![2 => 0u64..50, 1 => Just(0), 1 => 0u64..5000];
                (layouts(ranks, slots, experts), proptest::collection::vec(share, ranks * slots))
            })
    }

    fn loads(layout: &Layout, shares: &[u64]) -> Vec<u64> {
        shares.chunks_exact(layout.slots_per_rank()).map(|row| row.iter().sum()).collect()
    }

    proptest! {
        /// Whatever the loads: experts that leave enough slots are packed, in any order of ranks, and no row loses one.
        #[test]
        fn what_leaves_enough_slots_is_packed((layout, shares) in shared(), seed in any::<u64>()) {
            let (ranks, slots, experts) = (layout.num_ranks(), layout.slots_per_rank(), layout.num_experts());
            let level = shares.iter().sum::<u64>().div_ceil(ranks as u64);
            let mut order: Vec<usize> = (0..ranks).collect();
            crate::SplitMix64::new(seed).shuffle(&mut order);
            let mut table = layout.as_slice().to_vec();
            let part = Part { ranks: &order, group: 0..ranks, level, most_new: slots };
            let is_packed = Packing::default().pack(&mut table, &layout, &shares, part);
            prop_assert!(is_packed || experts > ranks * (slots - 1) + 1, "{:?}", layout);
            if is_packed {
                Layout::new(ranks, slots, experts, table).unwrap();
            }
        }

        /// Ranks that are not packed stay as they are, and those that are keep to the limit.
        #[test]
        fn only_the_ranks_named_change((layout, shares) in shared(), chosen in 1usize..10, most_new in 0usize..4) {
            let (ranks, slots, experts) = (layout.num_ranks(), layout.slots_per_rank(), layout.num_experts());
            let order: Vec<usize> = (0..chosen.min(ranks)).collect();
            let level = loads(&layout, &shares)[..order.len()].iter().sum::<u64>().div_ceil(order.len() as u64);
            let mut table = layout.as_slice().to_vec();
            let part = Part { ranks: &order, group: 0..ranks, level, most_new };
            if Packing::default().pack(&mut table, &layout, &shares, part) {
                let packed = Layout::new(ranks, slots, experts, table).unwrap();
                let received = packed.received_slots(&layout);
                prop_assert!(received.iter().all(|&received| received <= most_new), "{:?}", received);
                prop_assert!(packed.as_slice()[order.len() * slots..] == layout.as_slice()[order.len() * slots..]);
            }
        }
    }

    /// Walker's alias method: as many experts as ranks, two slots, and the loads of a hotspot.
    #[test]
    fn one_hot_expert_beside_each_cold_one() {
        let layout = Layout::static_ep(8, 2, 8).unwrap();
        let mut shares = vec![1; 16];
        shares[0] = 81;
        shares[8] = 81;
        let order: Vec<usize> = (0..8).collect();
        let mut table = layout.as_slice().to_vec();
        let part = Part { ranks: &order, group: 0..8, level: 22, most_new: 2 };
        assert!(Packing::default().pack(&mut table, &layout, &shares, part));
        let packed = Layout::new(8, 2, 8, table).unwrap();
        assert_eq!(packed.replicas(0), 8);
        assert!((1..8).all(|expert| packed.replicas(expert) >= 1));
    }
}
