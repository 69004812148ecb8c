use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
};

/// Replicas of each expert, `1 <= R_e <= ranks`, `slots` in all: each further replica goes to the expert with the most
/// load per replica, ties to the lower expert. `[E] -> [E]`
///
/// Expects `E <= slots <= E * ranks`.
pub(super) fn replicate(loads: &[u64], ranks: usize, slots: usize) -> Vec<usize> {
    let mut replicas = vec![1; loads.len()];
    let mut heap: BinaryHeap<(PerReplica, Reverse<usize>)> = BinaryHeap::new();
    if ranks > 1 {
        heap.extend(loads.iter().enumerate().map(|(e, &load)| (PerReplica { load, replicas: 1 }, Reverse(e))));
    }
    for _ in loads.len()..slots {
        let Some((_, Reverse(expert))) = heap.pop() else { break };
        replicas[expert] += 1;
        if replicas[expert] < ranks {
            heap.push((PerReplica { load: loads[expert], replicas: replicas[expert] as u64 }, Reverse(expert)));
        }
    }
    replicas
}

/// Load per replica in exact order: rounding must not decide between experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct PerReplica {
    pub load: u64,
    pub replicas: u64,
}

impl Ord for PerReplica {
    fn cmp(&self, other: &Self) -> Ordering {
        let cross = |a: u64, b: u64| u128::from(a) * u128::from(b);
        cross(self.load, other.replicas).cmp(&cross(other.load, self.replicas))
    }
}

impl PartialOrd for PerReplica {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for PerReplica {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for PerReplica {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_most_loaded_replica_is_halved_first() {
        assert_eq!(replicate(&[90, 132, 40, 61, 104, 165], 8, 8), [1, 2, 1, 1, 1, 2]);
        assert_eq!(replicate(&[100, 1, 1], 2, 5), [2, 2, 1], "an expert stands on each rank at most once");
    }

    proptest! {
        #[test]
        fn replicas_fill_the_slots(
            loads in proptest::collection::vec(prop_oneof![0u64..1000, Just(0), Just(u64::from(u32::MAX))], 1..20),
            ranks in 1usize..20,
            slots in 1usize..8,
        ) {
            let slots = slots.clamp(loads.len().div_ceil(ranks), loads.len());
            let replicas = replicate(&loads, ranks, ranks * slots);
            prop_assert_eq!(replicas.iter().sum::<usize>(), ranks * slots);
            prop_assert!(replicas.iter().all(|r| (1..=ranks).contains(r)));
        }
    }
}
