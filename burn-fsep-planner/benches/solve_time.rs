//! Solve times on one core: `cargo bench -p burn-fsep-planner --features tools`.

use std::{hint::black_box, time::Duration};

use burn_fsep_planner::{
    RoutingCounts, Topology,
    dispatch::{DispatchPlan, Dispatcher, MinMax},
    placement::{LayoutRequest, LayoutSolver, PaperSolver, RobustSolver},
    tools::workload::{Workload, WorkloadShape},
};
use criterion::Criterion;

/// Counts 0..1000, a function of the sizes alone.
fn counts(ranks: usize, experts: usize) -> RoutingCounts {
    let mut state = (ranks * 1000 + experts) as u64;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % 1001) as u32
    };
    RoutingCounts::new(ranks, experts, (0..ranks * experts).map(|_| draw()).collect()).expect("sizes are positive")
}

/// The setting of the exact-load systems: 8 of 256 experts a token, 8192 tokens a rank, Zipf loads of this static max/mean.
fn zipf_counts(max_over_mean: f64) -> RoutingCounts {
    let topology = Topology::uniform(64, 8).expect("sizes are positive");
    let shape = WorkloadShape { topology, num_experts: 256, topk: 8, tokens_per_rank: 8192, seed: 1 };
    Workload::ZipfImbalance(max_over_mean).counts(&shape, 0, 0).expect("the workload is possible")
}

fn solve_times(criterion: &mut Criterion) {
    let sweep = [16, 32, 64, 128, 256, 512, 1024].map(|ranks| (ranks, 32, 4));
    let uniform = [(32, 8, 2), (32, 128, 8), (64, 256, 6)]
        .into_iter()
        .chain(sweep)
        .map(|(ranks, experts, slots)| (String::new(), counts(ranks, experts), slots));
    let zipf = [1.5, 2.0, 3.0].map(|skew| (format!(" Zipf {skew}"), zipf_counts(skew), 6));
    for (loads, counts, slots) in uniform.chain(zipf) {
        let (ranks, experts) = (counts.num_ranks(), counts.num_experts());
        let topology = Topology::uniform(ranks, 8).expect("sizes are positive");
        let request = LayoutRequest { topology: &topology, slots_per_rank: slots, predicted: &counts, previous: None };
        let name = format!("N={ranks} E={experts} C={slots}{loads}");
        let mut solver = RobustSolver::new(0);
        criterion.bench_function(&format!("layout   {name}"), |b| b.iter(|| solver.solve(black_box(&request))));
        let layout = solver.solve(&request).expect("the experts fit");
        let (mut dispatcher, mut plan) = (MinMax::new(), DispatchPlan::new());
        criterion.bench_function(&format!("dispatch {name}"), |b| {
            b.iter(|| dispatcher.dispatch(&topology, black_box(&layout), &counts, &mut plan));
        });
        let mut paper = PaperSolver::default();
        criterion.bench_function(&format!("paper    {name}"), |b| b.iter(|| paper.solve(black_box(&request))));
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
        .configure_from_args();
    solve_times(&mut criterion);
    criterion.final_summary();
}
