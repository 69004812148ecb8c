//! Repairs of hand-made and random layouts, against every layout there is where those can be counted.

use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::{LayoutRepair, RepairConfig};
use crate::{
    Layout, RoutingCounts, Topology,
    dispatch::{DispatchPlan, Dispatcher, MinMax},
    test_cases::{Case, cases},
};

/// Repairs whatever is not perfect, for nothing.
fn eager() -> RepairConfig {
    RepairConfig { tolerance: 1.0, ..RepairConfig::free() }
}

fn repaired(config: RepairConfig, case: &Case) -> Option<Layout> {
    LayoutRepair::new(config).unwrap().repair(&case.topology, &case.layout, &case.counts).unwrap()
}

fn max_load(case: &Case, layout: &Layout) -> u64 {
    let mut plan = DispatchPlan::new();
    MinMax::exact().dispatch(&case.topology, layout, &case.counts, &mut plan).unwrap();
    plan.loads().into_iter().max().unwrap()
}

fn imbalance(case: &Case, layout: &Layout) -> f64 {
    max_load(case, layout) as f64 * layout.num_ranks() as f64 / case.counts.total().max(1) as f64
}

/// Most experts that a rank gets.
fn most_new(before: &Layout, after: &Layout) -> usize {
    after.received_slots(before).into_iter().max().unwrap()
}

fn shifted() -> Case {
    Case {
        topology: Topology::single_node(4).unwrap(),
        layout: Layout::from_rows(4, &[vec![0, 1], vec![0, 2], vec![0, 3], vec![1, 2]]).unwrap(),
        counts: RoutingCounts::from_rows(&vec![vec![5, 15, 15, 65]; 4]).unwrap(),
    }
}

#[test]
fn a_sudden_shift_is_repaired_with_few_slots() {
    let case = shifted();
    let layout = repaired(RepairConfig::free(), &case).unwrap();
    assert!(imbalance(&case, &case.layout) > 2.0);
    assert!(imbalance(&case, &layout) < 1.01, "{layout:?}");
    assert!(layout.moved_slots(&case.layout) <= 3 && most_new(&case.layout, &layout) == 1, "{layout:?}");
}

#[test]
fn a_repair_that_costs_more_than_it_saves_is_left() {
    let config = RepairConfig { bytes_per_expert: 1e12, ..RepairConfig::free() };
    assert_eq!(repaired(config, &shifted()), None);
    for config in [
        RepairConfig { tolerance: 0.5, ..RepairConfig::free() },
        RepairConfig { bytes_per_expert: f64::NAN, ..RepairConfig::free() },
    ] {
        assert!(LayoutRepair::new(config).is_err(), "{config:?}");
    }
}

/// The more a slot costs, the less is repaired; and in between, less than all is.
#[test]
fn the_more_a_slot_costs_the_fewer_change() {
    let mut runner = TestRunner::deterministic();
    let mut partly = 0;
    for _ in 0..100 {
        let case = skewed(8, 16).new_tree(&mut runner).unwrap().current();
        let unit = RepairConfig { bytes_per_expert: 1.0, ..eager() };
        let prices = (0..24).map(|i| 1e5 * f64::from(1u32 << i)).chain([1e15]);
        let choose = |bytes_per_expert| {
            let layout = repaired(RepairConfig { bytes_per_expert, ..unit }, &case);
            layout.map_or(0.0, |layout| unit.transfer_seconds(&case.topology, &layout.received_slots(&case.layout)))
        };
        let transfers: Vec<f64> = prices.map(choose).collect();
        assert!(transfers.is_sorted_by(|a, b| a >= b), "{case:?}: {transfers:?}");
        assert!(case.topology.world_size() == 1 || transfers[24] == 0.0, "{case:?}");
        partly += usize::from(transfers.iter().any(|&transfer| transfer > 0.0 && transfer < transfers[0]));
    }
    assert!(partly > 5, "{partly}");
}

#[test]
fn nodes_that_hold_all_experts_keep_their_tokens() {
    let case = Case {
        topology: Topology::uniform(8, 4).unwrap(),
        layout: Layout::static_ep(8, 2, 5).unwrap(),
        counts: RoutingCounts::from_rows(&vec![vec![5, 5, 60, 10, 10]; 8]).unwrap(),
    };
    let layout = repaired(RepairConfig::free(), &case).unwrap();
    let mut plan = DispatchPlan::new();
    MinMax::new().dispatch(&case.topology, &layout, &case.counts, &mut plan).unwrap();
    assert!(plan.max_over_mean() < 1.01, "{layout:?}");
    assert_eq!(plan.cross_node_tokens(&case.topology), 0, "{layout:?}");
}

/// Every layout of these sizes: the smallest maximum.
fn least_of_all_layouts(case: &Case) -> u64 {
    let (ranks, slots, experts) = (case.layout.num_ranks(), case.layout.slots_per_rank(), case.layout.num_experts());
    let rows: Vec<Vec<u32>> = (0..1u32 << experts)
        .filter(|set| set.count_ones() as usize == slots)
        .map(|set| (0..experts as u32).filter(|e| set >> e & 1 == 1).collect())
        .collect();
    let mut least = u64::MAX;
    for number in 0..rows.len().pow(ranks as u32) {
        let table: Vec<Vec<u32>> =
            (0..ranks as u32).map(|rank| rows[number / rows.len().pow(rank) % rows.len()].clone()).collect();
        if let Ok(layout) = Layout::from_rows(experts, &table) {
            least = least.min(max_load(case, &layout));
        }
    }
    least
}

/// Cases with more load on some experts, as where a hotspot has moved.
fn skewed(max_ranks: usize, max_experts: usize) -> impl Strategy<Value = Case> {
    (cases(max_ranks, max_experts), proptest::collection::vec(0u32..4, max_experts)).prop_map(|(case, powers)| {
        let (ranks, experts) = (case.counts.num_ranks(), case.counts.num_experts());
        let counts =
            (0..ranks * experts).map(|i| case.counts.get(i / experts, i % experts) * 8u32.pow(powers[i % experts]));
        Case { counts: RoutingCounts::new(ranks, experts, counts.collect()).unwrap(), ..case }
    })
}

/// Whether experts leave enough slots for every rank to be filled exactly.
fn has_spare_slots(case: &Case) -> bool {
    case.layout.num_experts() <= case.layout.num_ranks() * (case.layout.slots_per_rank() - 1) + 1
}

proptest! {
    #[test]
    fn repairs_are_better_and_deterministic(case in skewed(8, 10), bytes in prop_oneof![Just(0.0), 0.0..1e9]) {
        for config in [RepairConfig::free(), RepairConfig { bytes_per_expert: bytes, ..eager() }] {
            let layout = repaired(config, &case);
            prop_assert_eq!(&layout, &repaired(config, &case));
            if let Some(layout) = layout {
                let (before, after) = (max_load(&case, &case.layout), max_load(&case, &layout));
                prop_assert!(after < before, "{} of {}", after, before);
                let saved = 3.0 * (before - after) as f64 * config.constants.seconds_per_assignment;
                prop_assert!(saved > config.transfer_seconds(&case.topology, &layout.received_slots(&case.layout)));
            }
        }
    }

    /// With `E <= N * (C - 1) + 1` the mean is reached from any layout, in the worst case too.
    #[test]
    fn with_spare_slots_nothing_is_above_the_mean(case in skewed(12, 16)) {
        let layout = repaired(eager(), &case).unwrap_or_else(|| case.layout.clone());
        let mean = case.counts.total().div_ceil(case.layout.num_ranks() as u64);
        if has_spare_slots(&case) {
            prop_assert_eq!(max_load(&case, &layout), mean);
        }
    }

    /// What a repaired layout was made for, it keeps: without a reason nothing changes.
    #[test]
    fn a_repaired_layout_is_not_repaired_again(case in skewed(8, 10)) {
        if let (true, Some(layout)) = (has_spare_slots(&case), repaired(RepairConfig::free(), &case)) {
            prop_assert_eq!(repaired(RepairConfig::free(), &Case { layout, ..case }), None);
        }
    }
}

/// Without spare slots it is a matter of luck; how far from the best of all layouts that is, on average.
#[test]
fn without_spare_slots_repairs_come_close_to_the_best_layout() {
    let mut runner = TestRunner::deterministic();
    let (mut cases, mut sums) = (0, [0.0; 2]);
    while cases < 100 {
        let case = skewed(3, 5).new_tree(&mut runner).unwrap().current();
        if has_spare_slots(&case) || case.counts.total() == 0 {
            continue;
        }
        let layout = repaired(eager(), &case).unwrap_or_else(|| case.layout.clone());
        let least = least_of_all_layouts(&case) as f64;
        let over = [&case.layout, &layout].map(|layout| max_load(&case, layout) as f64 / least);
        assert!(1.0 <= over[1] && over[1] <= over[0], "{case:?}: {over:?}");
        sums = [sums[0] + over[0], sums[1] + over[1]];
        cases += 1;
    }
    let [before, after] = sums.map(|sum| sum / f64::from(cases));
    println!("largest load over the best layout's: {before:.3}, repaired {after:.3}");
    assert!(after - 1.0 < (before - 1.0) / 10.0, "{before}, repaired {after}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_layout_is_better_where_there_are_spare_slots(case in skewed(3, 4)) {
        let layout = repaired(eager(), &case).unwrap_or_else(|| case.layout.clone());
        let (reached, least) = (max_load(&case, &layout), least_of_all_layouts(&case));
        prop_assert!(reached >= least);
        if has_spare_slots(&case) {
            prop_assert_eq!(reached, least);
        }
    }
}
