//! Random cases for property tests.

use proptest::prelude::*;

use crate::{Layout, RoutingCounts, Topology};

/// A topology, and a layout and counts that fit it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub topology: Topology,
    pub layout: Layout,
    pub counts: RoutingCounts,
}

/// Cases with any numbers of ranks, nodes, slots and experts up to the limits; with ranks and experts without tokens.
pub(crate) fn cases(max_ranks: usize, max_experts: usize) -> impl Strategy<Value = Case> {
    (1..=max_ranks, 1..=max_experts, 1..=max_ranks)
        .prop_flat_map(|(ranks, experts, per_node)| {
            (experts.div_ceil(ranks)..=experts).prop_map(move |slots| (ranks, experts, per_node, slots))
        })
        .prop_flat_map(|(ranks, experts, per_node, slots)| {
            let counts = proptest::collection::vec(prop_oneof![3 => 0u32..40, 1 => Just(0)], ranks * experts);
            (counts, layouts(ranks, slots, experts)).prop_map(move |(counts, layout)| Case {
                topology: Topology::uniform(ranks, per_node).unwrap(),
                layout,
                counts: RoutingCounts::new(ranks, experts, counts).unwrap(),
            })
        })
}

/// Random valid layouts.
pub(crate) fn layouts(ranks: usize, slots: usize, experts: usize) -> impl Strategy<Value = Layout> {
    Just((0..experts as u32).collect::<Vec<_>>()).prop_shuffle().prop_flat_map(move |order| {
        let rows = proptest::collection::vec(Just(order.clone()).prop_shuffle(), ranks);
        rows.prop_map(move |rows| {
            // The first E slots hold every expert once; the others follow a random order without repetition.
            let mut table: Vec<Vec<u32>> = vec![Vec::new(); ranks];
            for (i, &expert) in order.iter().enumerate() {
                table[i % ranks].push(expert);
            }
            for (held, row) in table.iter_mut().zip(rows) {
                let fresh: Vec<u32> = row.into_iter().filter(|e| !held.contains(e)).collect();
                held.extend(fresh.into_iter().take(slots - held.len()));
            }
            Layout::from_rows(experts, &table).unwrap()
        })
    })
}
