use std::cmp::Reverse;

use super::{Packing, Part};
use crate::{Layout, PlannerError, SplitMix64, Topology, dispatch::Flow};

/// Lays out experts on a group of ranks among which tokens move freely.
///
/// Replicas are counted in proportion to load, of all experts or of the large ones. A placement deals replicas round by round,
/// the largest share of a round to the least loaded rank. Shares are blurred by random factors, so that each placement pairs
/// experts differently: a rank that shares experts with many others lets dispatch repair a wrong prediction. Of some placements
/// the one is taken whose best dispatch is best on the prediction and on randomly perturbed copies of it. If the first do not
/// even balance the prediction itself, the best of them is packed anew ([`Packing`]); where there are no spare slots for that,
/// single slots are exchanged. The layout in use stays if none is clearly better, since slots that do not change need no
/// restoring where restored weights are kept.
#[derive(Debug, Clone)]
pub(super) struct GroupSolver {
    /// How many placements are tried.
    pub candidates: usize,
    /// How many exchanges may be tried for a group, times its slots: each costs a flow.
    pub exchanges: usize,
    pub rng: SplitMix64,
    flow: Flow,
    packing: Packing,
}

/// Perturbed copies of the prediction that a placement is judged on.
const PERTURBATIONS: usize = 1;
/// Relative size of the perturbations: the prediction error that is expected.
const EXPECTED_ERROR: f64 = 0.15;
/// Imbalance at which a placement is good enough to stop: that which the dispatcher leaves anyway.
const GOOD_ENOUGH: f64 = 1.004;
/// Imbalance on the prediction above which exchanges are searched.
const SEARCH_ABOVE: f64 = 1.005;
/// Deals after which the best is packed anew if none balances the prediction.
const DEALS: usize = 4;
/// Most exchanges that are tried.
const MOST_EXCHANGES: usize = 3000;
/// Most exchanges that are tried in all groups together, times the slots of a group.
pub(super) const EXCHANGES: usize = 30_000;
/// Fewer find nothing.
const LEAST_EXCHANGES: usize = 64;
/// Random exchanges from which a search that is stuck goes on.
const KICKS: usize = 3;
/// Imbalance of perturbed copies up to which all placements are alike.
const REPAIRABLE: f64 = 1.02;
/// How much worse, relatively, the layout in use may be and still stay.
const KEEP: f64 = 1.003;
/// Groups up to this size are renumbered to keep slots; beyond, the search would cost more than it saves.
const RENUMBERED: usize = 64;

impl GroupSolver {
    pub fn new(seed: u64) -> Self {
        Self {
            candidates: 12,
            exchanges: EXCHANGES,
            rng: SplitMix64::new(seed),
            flow: Flow::default(),
            packing: Packing::default(),
        }
    }

    /// The layout of `ranks` ranks for experts with these totals. `before` is the layout in use, if it is one.
    pub fn solve(
        &mut self,
        ranks: usize,
        slots: usize,
        totals: &[u64],
        before: Option<Layout>,
    ) -> Result<Layout, PlannerError> {
        let node = Topology::single_node(ranks)?;
        let cases = self.cases(totals);
        let score_before = before.as_ref().map(|layout| self.score(layout, &cases, &node));
        if let (Some(layout), Some(score)) = (&before, score_before)
            && score <= GOOD_ENOUGH
        {
            return Ok(layout.clone());
        }
        let mean = totals.iter().sum::<u64>() / ranks as u64;
        // Without a second replica of anything, dispatch has no choice and placements no robustness to differ in.
        let candidates = if ranks * slots == totals.len() { 1 } else { self.candidates.max(1) };
        let mut best: Option<(f64, Layout)> = None;
        let mut tried = Vec::new();
        // Replicas for all, since any load may grow; only if that does not balance, for those that have to be split.
        'found: for small in [0, mean] {
            if best.as_ref().is_some_and(|(score, _)| *score <= SEARCH_ABOVE) {
                break;
            }
            let replicas = replica_counts(totals, ranks, ranks * slots, small);
            if replicas == tried {
                break;
            }
            for candidate in 0..candidates {
                let Some(table) = self.deal(totals, &replicas, ranks, slots, candidates > 1 && candidate % 2 == 0)
                else {
                    continue;
                };
                let layout = Layout::new(ranks, slots, totals.len(), table)?;
                let score = self.score(&layout, &cases, &node);
                if best.as_ref().is_none_or(|(least, _)| score < *least) {
                    best = Some((score, layout));
                    if score <= GOOD_ENOUGH {
                        break 'found;
                    }
                }
                // Where dealing does not even balance the prediction, more of it will not.
                if candidate + 1 == DEALS
                    && let Some((score, layout)) = &best
                    && *score > SEARCH_ABOVE
                    && self.score(layout, &cases[..1], &node) > SEARCH_ABOVE
                    && let Some(packed) = self.pack(layout, totals, &node)?
                {
                    best = Some((self.score(&packed, &cases, &node), packed));
                    break 'found;
                }
            }
            tried = replicas;
        }
        // Dealing can paint itself into a corner; the static layout always exists.
        let (score, best) = match best {
            Some(best) => best,
            None => (f64::INFINITY, Layout::static_ep(ranks, slots, totals.len())?),
        };
        let (score, best) = if slots > 1 && self.score(&best, &cases[..1], &node) > SEARCH_ABOVE {
            let best = self.exchange(best, totals, &node)?;
            (self.score(&best, &cases, &node), best)
        } else {
            (score, best)
        };
        match before {
            Some(layout) if score_before.is_some_and(|before| before <= score * KEEP) => Ok(layout),
            Some(layout) if ranks <= RENUMBERED => renumber(&best, &layout),
            _ => Ok(best),
        }
    }

    /// The layout with all ranks packed anew, if it is out of balance on the prediction and that can be.
    fn pack(&mut self, layout: &Layout, totals: &[u64], node: &Topology) -> Result<Option<Layout>, PlannerError> {
        let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
        let total: u64 = totals.iter().sum();
        let level = total.div_ceil(ranks as u64).max((total as f64 / ranks as f64 * GOOD_ENOUGH) as u64);
        if self.flow.solve_totals(layout, totals, node, GOOD_ENOUGH - 1.0) <= level {
            return Ok(None);
        }
        let share = |i: usize| u64::from(self.flow.edges[self.flow.edge_of(layout, i / slots, i % slots)]);
        let shares: Vec<u64> = (0..ranks * slots).map(share).collect();
        let mut order: Vec<usize> = (0..ranks).collect();
        order.sort_by_key(|&rank| Reverse(self.flow.loads[rank]));
        let mut table = layout.as_slice().to_vec();
        let part = Part { ranks: &order, group: 0..ranks, level, most_new: slots };
        if !self.packing.pack(&mut table, layout, &shares, part) {
            return Ok(None);
        }
        Layout::new(ranks, slots, layout.num_experts(), table).map(Some)
    }

    /// Iterated local search over exchanges, for the few layouts that dealing leaves out of balance: most have next to
    /// no spare slots, and are an exercise in packing. Where no exchange with the most loaded rank helps any more, some
    /// random ones are made and the search goes on from there; the best layout seen is the result.
    fn exchange(&mut self, layout: Layout, totals: &[u64], node: &Topology) -> Result<Layout, PlannerError> {
        let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
        let goal = (totals.iter().sum::<u64>() as f64 / ranks as f64 * GOOD_ENOUGH) as u64;
        let mut max = self.flow.solve_totals(&layout, totals, node, GOOD_ENOUGH - 1.0);
        let mut best = (max, layout.clone());
        let mut current = layout;
        let mut tries = (self.exchanges / (ranks * slots)).min(MOST_EXCHANGES);
        if tries < LEAST_EXCHANGES {
            return Ok(current);
        }
        while best.0 > goal && tries > 0 {
            max = self.descend(&mut current, max, totals, node, goal, &mut tries)?;
            if max < best.0 {
                best = (max, current.clone());
            }
            current = best.1.clone();
            for _ in 0..KICKS {
                let [a, b] = [(); 2].map(|()| self.rng.below(ranks * slots));
                let is_swap = self.rng.below(2) == 0;
                current = exchanged(&current, a, b, is_swap).unwrap_or(current);
            }
            max = self.flow.solve_totals(&current, totals, node, GOOD_ENOUGH - 1.0);
            tries = tries.saturating_sub(1);
        }
        Ok(best.1)
    }

    /// Makes exchanges with the most loaded rank as long as they lower the maximum: of two experts, or of another
    /// rank's expert for a further replica of one of its own. Returns the maximum.
    fn descend(
        &mut self,
        layout: &mut Layout,
        mut max: u64,
        totals: &[u64],
        node: &Topology,
        goal: u64,
        tries: &mut usize,
    ) -> Result<u64, PlannerError> {
        let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
        'improved: while max > goal {
            self.flow.solve_totals(layout, totals, node, GOOD_ENOUGH - 1.0);
            let mut order: Vec<usize> = (0..ranks).collect();
            order.sort_by_key(|&rank| self.flow.loads[rank]);
            let Some(full) = order.pop() else { break };
            for other in order {
                for i in 0..slots * slots {
                    for is_swap in [true, false] {
                        let (mine, theirs) = (full * slots + i / slots, other * slots + i % slots);
                        let Some(next) = exchanged(layout, mine, theirs, is_swap) else { continue };
                        if *tries == 0 {
                            return Ok(max);
                        }
                        *tries -= 1;
                        let reached = self.flow.solve_totals(&next, totals, node, GOOD_ENOUGH - 1.0);
                        if reached < max {
                            (*layout, max) = (next, reached);
                            continue 'improved;
                        }
                    }
                }
            }
            break;
        }
        Ok(max)
    }

    /// Imbalance of the layout's best dispatch of the prediction, and what perturbed copies of it exceed
    /// [`REPAIRABLE`] by.
    fn score(&mut self, layout: &Layout, cases: &[Vec<u64>], node: &Topology) -> f64 {
        let mut imbalance = |totals: &[u64], tolerable: f64| {
            let total: u64 = totals.iter().sum();
            let max = self.flow.solve_totals(layout, totals, node, tolerable - 1.0);
            if total == 0 { 1.0 } else { max as f64 * layout.num_ranks() as f64 / total as f64 }
        };
        let [prediction, perturbed @ ..] = cases else { return f64::INFINITY };
        let exceeding: f64 = perturbed.iter().map(|case| (imbalance(case, REPAIRABLE) - REPAIRABLE).max(0.0)).sum();
        imbalance(prediction, GOOD_ENOUGH) + exceeding
    }

    /// The prediction and perturbed copies of it.
    fn cases(&mut self, totals: &[u64]) -> Vec<Vec<u64>> {
        let mut cases = vec![totals.to_vec()];
        for _ in 0..PERTURBATIONS {
            cases.push(totals.iter().map(|&n| (n as f64 * self.factor(EXPECTED_ERROR)) as u64).collect());
        }
        cases
    }

    /// A random factor in `1 - spread .. 1 + spread`.
    fn factor(&mut self, spread: f64) -> f64 {
        let unit = self.rng.below(1 << 20) as f64 / f64::from(1 << 20);
        1.0 + spread * (2.0 * unit - 1.0)
    }

    /// Deals replicas to ranks in rounds. Row-major `[n, C]`, or `None` if an expert would stand twice on a rank and no
    /// exchange helps.
    fn deal(
        &mut self,
        totals: &[u64],
        replicas: &[usize],
        ranks: usize,
        slots: usize,
        is_blurred: bool,
    ) -> Option<Vec<u32>> {
        let mut shares: Vec<(f64, u32)> = Vec::with_capacity(ranks * slots);
        for (expert, &count) in replicas.iter().enumerate() {
            let share = totals[expert] as f64 / count as f64;
            // Each replica by itself, so that an expert's replicas stand beside different experts.
            for _ in 0..count {
                shares.push((if is_blurred { share * self.factor(0.5) } else { share }, expert as u32));
            }
        }
        shares.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));

        let mut table = vec![u32::MAX; ranks * slots];
        let mut loads = vec![0.0f64; ranks];
        let mut order: Vec<usize> = (0..ranks).collect();
        for (round, dealt) in shares.chunks_exact_mut(ranks).enumerate() {
            if round == 0 || is_blurred {
                self.rng.shuffle(&mut order);
            }
            order.sort_by(|&a, &b| loads[a].total_cmp(&loads[b]));
            let holds =
                |table: &[u32], rank: usize, expert: u32| table[rank * slots..rank * slots + round].contains(&expert);
            for i in 0..ranks {
                let rank = order[i];
                if holds(&table, rank, dealt[i].1) {
                    // Exchange with the nearest place of this round where both fit.
                    let partner =
                        (1..ranks).flat_map(|d| [i.checked_add(d), i.checked_sub(d)]).flatten().find(|&j| {
                            j < ranks
                                && !holds(&table, rank, dealt[j].1)
                                && !holds(&table, order[j], dealt[i].1)
                                && dealt[j].1 != dealt[i].1
                        })?;
                    dealt.swap(i, partner);
                    if partner < i {
                        table[order[partner] * slots + round] = dealt[partner].1;
                        loads[order[partner]] += dealt[partner].0 - dealt[i].0;
                    }
                }
                table[rank * slots + round] = dealt[i].1;
                loads[rank] += dealt[i].0;
            }
        }
        Some(table)
    }
}

/// The layout with the experts of two slots swapped, or with that of slot `a` in slot `b` too; `None` if that is none.
fn exchanged(layout: &Layout, a: usize, b: usize, is_swap: bool) -> Option<Layout> {
    let mut table = layout.as_slice().to_vec();
    if is_swap {
        table.swap(a, b)
    } else {
        table[b] = table[a]
    }
    Layout::new(layout.num_ranks(), layout.slots_per_rank(), layout.num_experts(), table).ok()
}

/// Replicas of each expert, `1 <= R_e <= n`, `slots` in all: each further replica goes to the expert with the most load
/// per replica of those whose load exceeds `small`, and only then to the others. `[E] -> [E]`
///
/// With few spare slots they are best spent on the experts that have to be split: a small expert fits a rank as it is, and
/// the more slots large ones have, the more ranks they can fill up beside a small one.
fn replica_counts(totals: &[u64], ranks: usize, slots: usize, small: u64) -> Vec<usize> {
    let sum: u64 = totals.iter().sum();
    let spare = slots - totals.len();
    // Start below the proportional counts, which the slots hold in any case; the heap decides the rest.
    let floor = |load: u64| if sum == 0 { 1 } else { (load as f64 / sum as f64 * spare as f64) as usize };
    let start = |&load: &u64| if load > small { floor(load).clamp(1, ranks) } else { 1 };
    let mut replicas: Vec<usize> = totals.iter().map(start).collect();
    let used: usize = replicas.iter().sum();
    let priority = |e: usize, count: usize| (totals[e] > small, per_replica(totals[e], count), Reverse(e));
    let mut heap: std::collections::BinaryHeap<(bool, u64, Reverse<usize>)> =
        (0..totals.len()).filter(|&e| replicas[e] < ranks).map(|e| priority(e, replicas[e])).collect();
    for _ in used..slots {
        let Some((_, _, Reverse(expert))) = heap.pop() else { break };
        replicas[expert] += 1;
        if replicas[expert] < ranks {
            heap.push(priority(expert, replicas[expert]));
        }
    }
    replicas
}

/// Load per replica, as a whole number fine enough to order experts.
fn per_replica(load: u64, replicas: usize) -> u64 {
    (load << 16) / replicas as u64
}

/// The same layout with ranks renumbered so that many keep the experts they hold: ranks of a group are alike.
fn renumber(layout: &Layout, before: &Layout) -> Result<Layout, PlannerError> {
    let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
    let common = |a: usize, b: usize| layout.experts_of(a).iter().filter(|e| before.experts_of(b).contains(e)).count();
    let mut pairs: Vec<(Reverse<usize>, usize, usize)> =
        (0..ranks).flat_map(|a| (0..ranks).map(move |b| (Reverse(common(a, b)), a, b))).collect();
    pairs.sort_unstable();
    let mut new_of = vec![None; ranks];
    let mut taken = vec![false; ranks];
    for (_, a, b) in pairs {
        if !taken[a] && new_of[b].is_none() {
            taken[a] = true;
            new_of[b] = Some(a);
        }
    }
    let mut table = Vec::with_capacity(ranks * slots);
    for a in new_of.into_iter().flatten() {
        table.extend_from_slice(layout.experts_of(a));
    }
    Layout::new(ranks, slots, layout.num_experts(), table)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn renumbering_keeps_what_it_can() {
        let before = Layout::from_rows(4, &[vec![0, 1], vec![2, 3], vec![0, 2]]).unwrap();
        let layout = Layout::from_rows(4, &[vec![2, 3], vec![0, 3], vec![1, 0]]).unwrap();
        let renumbered = renumber(&layout, &before).unwrap();
        assert_eq!(renumbered.moved_slots(&before), 1);
        assert_eq!(renumbered.replicas(3), layout.replicas(3));
    }

    proptest! {
        #[test]
        fn replicas_fill_the_slots(
            totals in proptest::collection::vec(prop_oneof![0u64..10_000, Just(0), Just(10_000_000)], 1..20),
            ranks in 1usize..20,
            slots in 1usize..8,
            small in prop_oneof![Just(0u64), 0u64..10_000],
        ) {
            let slots = slots.clamp(totals.len().div_ceil(ranks), totals.len());
            let replicas = replica_counts(&totals, ranks, ranks * slots, small);
            prop_assert_eq!(replicas.iter().sum::<usize>(), ranks * slots);
            prop_assert!(replicas.iter().all(|r| (1..=ranks).contains(r)));
        }
    }
}
