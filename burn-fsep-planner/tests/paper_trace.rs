//! Quality on the routing of the paper's own run. The trace is not part of the project: without it the test says so.
#![cfg(feature = "tools")]

use burn_fsep_planner::{
    PlannerStrategy, Topology,
    tools::{
        replay::{ReplayConfig, Spread, replay},
        trace::Trace,
    },
};

#[test]
fn replay_of_the_papers_run() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/traces/laer_mixtral_8x7b_e8k2.csv");
    let Ok(text) = std::fs::read_to_string(path) else {
        eprintln!("skipped: {path} is not there");
        return;
    };
    let trace = Trace::from_csv(&text).unwrap();
    let config = ReplayConfig { topology: Topology::uniform(32, 8).unwrap(), slots_per_rank: 2, seed: 0, repair: None };
    let mut ours = None;
    for strategy in PlannerStrategy::ALL {
        let steps = replay(&trace, &config, strategy).unwrap();
        let steps: Vec<_> = steps.into_iter().filter(|step| step.step >= 2).collect();
        let spread = Spread::of(steps.iter().map(|step| step.max_over_mean)).unwrap();
        let crossing = Spread::of(steps.iter().map(|step| step.cross_node_share)).unwrap().mean;
        let moved = Spread::of(steps.iter().map(|step| step.moved_slots as f64)).unwrap().mean;
        let us = |time: fn(&burn_fsep_planner::tools::replay::ReplayStep) -> std::time::Duration| {
            Spread::of(steps.iter().map(|step| time(step).as_secs_f64() * 1e6)).unwrap().p50
        };
        println!(
            "{strategy:8} mean {:.4} p99 {:.4} max {:.4} cross-node {:.4} moved {moved:.1} layout {:.0} us dispatch {:.1} us",
            spread.mean,
            spread.p99,
            spread.max,
            crossing,
            us(|s| s.layout_time),
            us(|s| s.dispatch_time)
        );
        if strategy == PlannerStrategy::MinMax {
            ours = Some((spread, crossing));
        }
    }
    let (spread, crossing) = ours.unwrap();
    assert!(spread.mean <= 1.01 && spread.p99 <= 1.05, "{spread:?}");
    assert!(crossing <= 0.02, "{crossing}");
}
