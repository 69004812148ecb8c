//! Ours against every baseline and against what no layout beats, on generated workloads. Layouts come from past steps.
//!
//! `cargo test --release -p burn-fsep-planner --features tools --test workloads -- --nocapture` prints the tables.
#![cfg(feature = "tools")]

use burn_fsep_planner::{
    PlannerStrategy, RoutingCounts, Topology,
    repair::RepairConfig,
    tools::{
        least_max_load,
        replay::{ReplayConfig, Spread, replay},
        trace::Trace,
        workload::{Workload, WorkloadShape},
    },
};

/// How much worse than a baseline, relatively, ours may be.
const TOLERANCE: f64 = 1.005;

/// Without optimisation, a few steps on the smaller shapes have to do.
const IS_FULL: bool = !cfg!(debug_assertions);
const STEPS: usize = 24;

/// Sizes to compare on.
#[derive(Debug, Clone, Copy)]
struct Size {
    ranks: usize,
    experts: usize,
    topk: usize,
    slots: usize,
}

const SIZES: [Size; 3] = [
    Size { ranks: 8, experts: 64, topk: 4, slots: 10 },
    Size { ranks: 64, experts: 128, topk: 4, slots: 4 },
    Size { ranks: 256, experts: 256, topk: 4, slots: 2 },
];

fn trace(workload: Workload, size: Size, steps: usize, seed: u64) -> Trace {
    let topology = Topology::uniform(size.ranks, 8).unwrap();
    let Size { experts: num_experts, topk, .. } = size;
    let shape = WorkloadShape { topology, num_experts, topk, tokens_per_rank: 4096, seed };
    workload.trace(&shape, 1, steps).unwrap()
}

/// Largest max/mean with repairs, mean and 95th percentile over W0 to W7's steps that any layout can balance.
const REPAIRED: [f64; 2] = [1.02, 1.05];

/// Max/mean from the second step on.
struct Comparison {
    /// By strategy, in the order of [`PlannerStrategy::ALL`].
    planned: Vec<Spread>,
    /// Ours with layouts repaired in the step.
    repaired: Spread,
    /// What no layout beats.
    bound: Spread,
    /// [`Comparison::repaired`] of the steps that any layout can balance.
    can_be_balanced: Vec<f64>,
}

fn compare(trace: &Trace, size: Size) -> Comparison {
    let topology = Topology::uniform(size.ranks, 8).unwrap();
    let imbalances = |strategy, repair| -> Vec<f64> {
        let config = ReplayConfig { topology: topology.clone(), slots_per_rank: size.slots, seed: 0, repair };
        let steps = replay(trace, &config, strategy).unwrap();
        steps.iter().filter(|step| step.step > 0).map(|step| step.max_over_mean).collect()
    };
    let spread = |values: &[f64]| Spread::of(values.iter().copied()).unwrap();
    let planned = PlannerStrategy::ALL.map(|strategy| spread(&imbalances(strategy, None))).to_vec();
    let repaired = imbalances(PlannerStrategy::MinMax, Some(RepairConfig::free()));
    let bound = |(_, counts): (usize, &RoutingCounts)| {
        let least = least_max_load(counts, size.slots).unwrap();
        least as f64 * size.ranks as f64 / counts.total() as f64
    };
    let bounds: Vec<f64> = trace.steps(0).skip(1).map(bound).collect();
    let balanced = repaired.iter().zip(&bounds).filter(|(_, bound)| **bound <= REPAIRED[0]);
    let can_be_balanced = balanced.map(|(imbalance, _)| *imbalance).collect();
    Comparison { planned, repaired: spread(&repaired), bound: spread(&bounds), can_be_balanced }
}

impl Comparison {
    fn print(&self, name: &str, value: fn(&Spread) -> f64) {
        print!("{name:<24}");
        self.planned.iter().for_each(|spread| print!("{:>18.4}", value(spread)));
        println!("{:>12.4}{:>8.4}", value(&self.repaired), value(&self.bound));
    }

    /// Where a spread of ours is worse than a baseline's.
    fn losses(&self, name: &str) -> Vec<String> {
        let ours = self.ours();
        let of = |(strategy, baseline): (&PlannerStrategy, &Spread)| {
            let is_lost = *strategy != PlannerStrategy::MinMax && ours.mean > baseline.mean * TOLERANCE;
            is_lost.then(|| format!("{name}: {:.4} against {:.4} of {strategy}", ours.mean, baseline.mean))
        };
        PlannerStrategy::ALL.iter().zip(&self.planned).filter_map(of).collect()
    }

    fn ours(&self) -> Spread {
        *self.planned.last().unwrap()
    }
}

fn print_header(first: &str) {
    print!("{first:<24}");
    PlannerStrategy::ALL.iter().for_each(|strategy| print!("{:>18}", strategy.name()));
    println!("{:>12}{:>8}", "repaired", "bound");
}

#[test]
fn ours_against_baselines_on_the_benchmark() {
    let mut lost = Vec::new();
    let sizes = if IS_FULL { &SIZES[..] } else { &SIZES[..1] };
    for &size in sizes {
        print_header(&format!("N={} E={} K={} C={}", size.ranks, size.experts, size.topk, size.slots));
        let mut repaired = Vec::new();
        for workload in Workload::BENCHMARK.into_iter().chain(Workload::FEW_HOT) {
            let comparison = compare(&trace(workload, size, STEPS, 1), size);
            comparison.print(&workload.name(), |spread| spread.mean);
            let name = format!("N={} {workload}", size.ranks);
            lost.extend(comparison.losses(&name));
            if Workload::BENCHMARK.contains(&workload) {
                repaired.extend(comparison.can_be_balanced);
            }
        }
        let steps = repaired.len();
        assert_eq!(steps, Workload::BENCHMARK.len() * (STEPS - 1), "all of them can be balanced");
        let Spread { mean, p95, max, .. } = Spread::of(repaired).unwrap();
        println!("W0 to W7 repaired: mean {mean:.4}, p95 {p95:.4}, largest {max:.4}, {steps} steps\n");
        assert!(mean <= REPAIRED[0] && p95 <= REPAIRED[1], "N={}: mean {mean}, p95 {p95}", size.ranks);
    }
    assert!(lost.is_empty(), "ours is worse: {lost:#?}");
}

/// Hot experts that were cold in the steps before: the better a layout fits the past, the worse it fits these steps. What
/// the seed draws matters here.
#[test]
fn steps_that_contradict_the_past() {
    let mut lost = Vec::new();
    let sizes = if IS_FULL { &SIZES[..] } else { &SIZES[..1] };
    for &size in sizes {
        for (workload, seed) in
            [Workload::RotatingHotspot, Workload::Burst].into_iter().flat_map(|w| (2..=4).map(move |seed| (w, seed)))
        {
            let comparison = compare(&trace(workload, size, STEPS, seed), size);
            let name = format!("N={} {workload} seed {seed}", size.ranks);
            comparison.print(&name, |spread| spread.mean);
            lost.extend(comparison.losses(&name));
        }
    }
    assert!(lost.is_empty(), "ours is worse: {lost:#?}");
}

#[test]
fn ours_against_baselines_under_drift() {
    let mut lost = Vec::new();
    let size = if IS_FULL { SIZES[1] } else { Size { ranks: 16, experts: 32, ..SIZES[1] } };
    let mut cases: Vec<(Workload, Size)> = Workload::DRIFT.map(|workload| (workload, size)).to_vec();
    cases.extend([1.5, 2.0, 3.0].map(|skew| (Workload::ZipfImbalance(skew), Size { topk: 2, ..size })));
    // One expert can have most of the load only where tokens choose one expert.
    cases.push((Workload::HotShare { percent: 60, experts: 1 }, Size { topk: 1, ..size }));
    if IS_FULL {
        cases.push((Workload::ZipfPower(1.2), Size { ranks: 64, experts: 256, topk: 8, slots: 8 }));
    }
    print_header("mean, and max below");
    for (workload, size) in cases {
        // Long enough for a shift.
        let comparison = compare(&trace(workload, size, STEPS, 1), size);
        comparison.print(&workload.name(), |spread| spread.mean);
        comparison.print("", |spread| spread.max);
        lost.extend(comparison.losses(&workload.name()));
    }
    assert!(lost.is_empty(), "ours is worse: {lost:#?}");
}
