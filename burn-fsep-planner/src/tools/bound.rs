use crate::{PlannerError, RoutingCounts};

/// What no layout and dispatch can beat: the smallest maximum load that the slots allow.
///
/// A maximum of `m` needs `m * N` to be at least the total, and of each expert as many replicas as hold its load at `m`
/// each: at least one, at most `N`, and no more than `N * C` for all experts. The smallest such `m` is a lower bound, not
/// always reached, as slots of one rank also share its maximum.
///
/// # Errors
///
/// As [`Layout::check_shape`](crate::Layout::check_shape).
pub fn least_max_load(counts: &RoutingCounts, slots_per_rank: usize) -> Result<u64, PlannerError> {
    let (ranks, experts) = (counts.num_ranks(), counts.num_experts());
    crate::Layout::check_shape(ranks, slots_per_rank, experts)?;
    let loads = counts.expert_totals();
    let slots = (ranks * slots_per_rank) as u64;
    let fits = |max: u64| {
        let needed = |load: u64| load.div_ceil(max).max(1);
        loads.iter().all(|&load| needed(load) <= ranks as u64) && loads.iter().map(|&n| needed(n)).sum::<u64>() <= slots
    };
    let mut low = counts.total().div_ceil(ranks as u64);
    if low == 0 {
        return Ok(0);
    }
    // At the largest load, one replica of each expert is enough.
    let mut high = loads.iter().copied().max().unwrap_or(0).max(low);
    while low < high {
        let middle = low + (high - low) / 2;
        if fits(middle) { high = middle } else { low = middle + 1 }
    }
    Ok(high)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        dispatch::{DispatchPlan, Dispatcher, MinMax},
        test_cases::cases,
    };

    #[test]
    fn slots_limit_how_often_an_expert_is_split() {
        let counts = RoutingCounts::from_rows(&vec![vec![90, 5, 5]; 4]).unwrap();
        assert_eq!(least_max_load(&counts, 1).unwrap(), 180, "two of four slots are left for the hot expert");
        assert_eq!(least_max_load(&counts, 2).unwrap(), 100, "the mean");
        assert_eq!(least_max_load(&RoutingCounts::from_rows(&[vec![0, 0]]).unwrap(), 2).unwrap(), 0);
        assert!(least_max_load(&counts, 4).is_err());
    }

    proptest! {
        #[test]
        fn no_layout_beats_it(case in cases(6, 8)) {
            let mut plan = DispatchPlan::new();
            MinMax::exact().dispatch(&case.topology, &case.layout, &case.counts, &mut plan).unwrap();
            let reached = plan.loads().into_iter().max().unwrap();
            let bound = least_max_load(&case.counts, case.layout.slots_per_rank()).unwrap();
            prop_assert!(bound <= reached, "{bound} > {reached}");
        }
    }
}
