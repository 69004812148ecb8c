use crate::Layout;

/// Exchanges slots between the most loaded rank and others, each with the load that it has now, until the most loaded rank has
/// at most `level` or no exchange helps it. What is left where there are no spare slots that experts could be split with.
///
/// `loads` is what each rank computes, shape `[N]`, `shares` what each slot does, shape `[N, C]`, `table` the slots, shape
/// `[N, C]`; all three are changed. No rank gets more than `most_new` experts that it does not hold in `layout`. Returns the
/// largest load.
pub(super) fn exchange(
    table: &mut [u32],
    loads: &mut [u64],
    shares: &mut [u64],
    layout: &Layout,
    level: u64,
    most_new: usize,
) -> u64 {
    let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
    let row = |rank: usize| rank * slots..(rank + 1) * slots;
    let may_get = |table: &[u32], rank: usize, slot: usize, expert: u32| {
        let held = layout.experts_of(rank);
        let new = |e: &u32| usize::from(!held.contains(e));
        let others = table[row(rank)].iter().enumerate().filter(|(i, _)| *i != slot);
        !table[row(rank)].contains(&expert) && others.map(|(_, e)| new(e)).sum::<usize>() + new(&expert) <= most_new
    };
    loop {
        let Some(full) = (0..ranks).max_by_key(|&rank| (loads[rank], std::cmp::Reverse(rank))) else { return 0 };
        if loads[full] <= level {
            return loads[full];
        }
        // The larger load of the two after the exchange, and the slots.
        let mut best: Option<(u64, usize, usize)> = None;
        for other in (0..ranks).filter(|&other| loads[other] < loads[full]) {
            for (mine, theirs) in row(full).flat_map(|mine| row(other).map(move |theirs| (mine, theirs))) {
                if shares[mine] <= shares[theirs] {
                    continue;
                }
                let handed_on = shares[mine] - shares[theirs];
                let larger = (loads[full] - handed_on).max(loads[other] + handed_on);
                if larger < best.map_or(loads[full], |(least, ..)| least)
                    && may_get(table, full, mine % slots, table[theirs])
                    && may_get(table, other, theirs % slots, table[mine])
                {
                    best = Some((larger, mine, theirs));
                }
            }
        }
        // Each exchange lowers a largest load and makes no other as large: this ends.
        let Some((_, mine, theirs)) = best else { return loads[full] };
        let handed_on = shares[mine] - shares[theirs];
        loads[full] -= handed_on;
        loads[theirs / slots] += handed_on;
        table.swap(mine, theirs);
        shares.swap(mine, theirs);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_cases::layouts;

    proptest! {
        #[test]
        fn exchanges_lower_the_largest_load_within_their_limit(
            (layout, shares) in (1usize..8, 1usize..4).prop_flat_map(|(ranks, slots)| {
                let shares = proptest::collection::vec(0u64..100, ranks * slots);
                (layouts(ranks, slots, ranks * slots), shares)
            }),
            most_new in 0usize..4,
        ) {
            let (slots, experts) = (layout.slots_per_rank(), layout.num_experts());
            let sums = |shares: &[u64]| -> Vec<u64> { shares.chunks_exact(slots).map(|row| row.iter().sum()).collect() };
            let (mut table, mut loads, mut moved) = (layout.as_slice().to_vec(), sums(&shares), shares.clone());
            let before = loads.iter().copied().max().unwrap();
            let after = exchange(&mut table, &mut loads, &mut moved, &layout, 0, most_new);
            prop_assert!(after <= before);
            prop_assert_eq!(&loads, &sums(&moved));
            prop_assert_eq!(loads.iter().copied().max().unwrap(), after);
            // Loads went with their experts.
            for (i, &expert) in layout.as_slice().iter().enumerate() {
                let at = table.iter().position(|&e| e == expert).unwrap();
                prop_assert_eq!(moved[at], shares[i]);
            }
            let exchanged = Layout::new(layout.num_ranks(), slots, experts, table).unwrap();
            prop_assert!(exchanged.received_slots(&layout).into_iter().all(|received| received <= most_new));
        }
    }

    #[test]
    fn two_large_experts_are_parted() {
        let layout = Layout::from_rows(4, &[vec![0, 1], vec![2, 3]]).unwrap();
        let (mut table, mut loads, mut shares) = (layout.as_slice().to_vec(), vec![20, 4], vec![9, 11, 1, 3]);
        assert_eq!(exchange(&mut table, &mut loads, &mut shares, &layout, 12, 1), 12);
        assert_eq!((table, loads), (vec![2, 1, 0, 3], vec![12, 12]));
    }
}
