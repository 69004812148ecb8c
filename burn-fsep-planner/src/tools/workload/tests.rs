use proptest::prelude::*;

use super::{Workload, WorkloadError, WorkloadShape};
use crate::Topology;

fn shape(ranks: usize, experts: usize, topk: usize) -> WorkloadShape {
    let topology = Topology::uniform(ranks, 8).unwrap();
    WorkloadShape { topology, num_experts: experts, topk, tokens_per_rank: 2048, seed: 7 }
}

fn all() -> Vec<Workload> {
    let with_numbers = [Workload::ZipfImbalance(1.5), Workload::ZipfPower(1.2)];
    [&Workload::BENCHMARK[..], &Workload::FEW_HOT, &Workload::DRIFT, &with_numbers].concat()
}

/// Share of each expert in a layer and step.
fn expert_shares(workload: Workload, shape: &WorkloadShape, step: usize) -> Vec<f64> {
    let counts = workload.counts(shape, 0, step).unwrap();
    let total = counts.total() as f64;
    counts.expert_totals().into_iter().map(|n| n as f64 / total).collect()
}

#[test]
fn names_round_trip() {
    for workload in all() {
        assert_eq!(workload.to_string().parse(), Ok(workload));
    }
    assert_eq!("W6".parse(), Ok(Workload::RotatingHotspot));
    assert_eq!("W3_spread_hot_experts".parse(), Ok(Workload::SpreadHotExperts));
    for unknown in ["", "w", "w8", "80", "80:", ":4", "80:4:1", "zipf:", "zipf:x", "300:4", "-1:4"] {
        let error = unknown.parse::<Workload>().unwrap_err();
        assert!(error.to_string().contains("w0-balanced"), "{error}");
    }
}

#[test]
fn tokens_choose_different_experts_and_none_is_lost() {
    let shape = shape(16, 32, 4);
    for workload in all() {
        for step in [0, 5] {
            let counts = workload.counts(&shape, 1, step).unwrap();
            assert_eq!(counts, workload.counts(&shape, 1, step).unwrap(), "{workload} depends on more than its step");
            assert_eq!(counts.total(), 16 * 2048 * 4, "{workload}");
            for rank in 0..16 {
                let tokens = counts.row(rank).iter().sum::<u32>() / 4;
                assert!(counts.row(rank).iter().all(|&n| n <= tokens), "{workload}: {:?}", counts.row(rank));
            }
        }
    }
}

#[test]
fn seeds_layers_and_steps_differ() {
    let shape = shape(8, 16, 2);
    let other = WorkloadShape { seed: 8, ..shape.clone() };
    for workload in all().into_iter().filter(|&workload| workload != Workload::Balanced) {
        let counts = workload.counts(&shape, 0, 0).unwrap();
        assert_ne!(counts, workload.counts(&other, 0, 0).unwrap(), "{workload}");
        assert_ne!(counts, workload.counts(&shape, 1, 0).unwrap(), "{workload}");
        assert_ne!(counts, workload.counts(&shape, 0, 1).unwrap(), "{workload}");
    }
}

#[test]
fn the_benchmark_isolates_what_it_says() {
    let shape = shape(8, 64, 4);
    let hot = |workload, step| -> Vec<usize> {
        let shares = expert_shares(workload, &shape, step);
        (0..64).filter(|&e| shares[e] > 2.0 / 64.0).collect()
    };
    let balanced = Workload::Balanced.counts(&shape, 0, 3).unwrap();
    assert!(balanced.as_slice().iter().all(|&n| n == 2048 * 4 / 64));
    assert_eq!(hot(Workload::HotExpertSet, 0).len(), 8);
    assert_eq!(hot(Workload::HotExpertSet, 0), hot(Workload::HotExpertSet, 9));
    let neighbours = hot(Workload::HotRank, 0);
    assert!(neighbours.len() == 8 && neighbours[0].is_multiple_of(8) && neighbours[7] == neighbours[0] + 7);
    assert!(hot(Workload::SpreadHotExperts, 0).windows(2).all(|pair| pair[1] - pair[0] == 8));
    assert!(hot(Workload::SourceRagged, 0).is_empty());
    let ragged = Workload::SourceRagged.counts(&shape, 0, 0).unwrap();
    let tokens: Vec<u32> = (0..8).map(|rank| ragged.row(rank).iter().sum()).collect();
    assert!(tokens.iter().max().unwrap() > &(2 * tokens.iter().min().unwrap()), "{tokens:?}");
    assert_eq!(expert_shares(Workload::ZeroExpertRank, &shape, 0).iter().filter(|&&s| s == 0.0).count(), 16);
    let (before, after) = (hot(Workload::RotatingHotspot, 0), hot(Workload::RotatingHotspot, 1));
    assert!(before.len() == 8 && after.len() == 8 && before.iter().all(|e| !after.contains(e)));
    let bursts: Vec<usize> = (0..16).filter(|&step| !hot(Workload::Burst, step).is_empty()).collect();
    assert_eq!(bursts, [5, 13]);
    assert_ne!(hot(Workload::Burst, 5), hot(Workload::Burst, 13));
}

#[test]
fn few_hot_experts_get_their_share() {
    let shape = shape(8, 32, 4);
    for workload in Workload::FEW_HOT {
        let Workload::HotShare { percent, experts } = workload else { unreachable!() };
        let mut shares = expert_shares(workload, &shape, 0);
        shares.sort_by(|a, b| b.total_cmp(a));
        let hot: f64 = shares[..experts].iter().sum();
        assert!((hot - f64::from(percent) / 100.0).abs() < 0.01, "{workload}: {hot}");
    }
}

#[test]
fn zipf_loads_have_the_static_imbalance_asked_for() {
    for skew in [1.5, 2.0, 3.0] {
        let shares = expert_shares(Workload::ZipfImbalance(skew), &shape(64, 256, 8), 0);
        let hottest = shares.chunks(4).map(|block| block.iter().sum::<f64>()).fold(0.0, f64::max);
        assert!((hottest * 64.0 - skew).abs() < 0.03, "{skew}: {}", hottest * 64.0);
    }
}

#[test]
fn log_shares_correlate_as_in_training() {
    let shape = WorkloadShape { tokens_per_rank: 100_000, ..shape(16, 256, 1) };
    let logs = |step| -> Vec<f64> {
        expert_shares(Workload::LogNormal(0.45), &shape, step).into_iter().map(|share| share.ln()).collect()
    };
    let correlation = |a: &[f64], b: &[f64]| {
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let (ma, mb) = (mean(a), mean(b));
        let cross =
            |x: &[f64], mx: f64, y: &[f64], my: f64| -> f64 { x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum() };
        cross(a, ma, b, mb) / (cross(a, ma, a, ma) * cross(b, mb, b, mb)).sqrt()
    };
    let now = logs(20);
    let (near, far) = (correlation(&now, &logs(21)), correlation(&now, &logs(25)));
    assert!((0.84..0.93).contains(&near) && (0.70..0.84).contains(&far), "{near} {far}");
    let jump: f64 = logs(1).iter().zip(&logs(2)).map(|(a, b)| (a.exp() - b.exp()).abs() / 2.0).sum();
    assert!((0.3..0.5).contains(&jump), "{jump}");
}

#[test]
fn impossible_workloads_are_typed_errors() {
    let shape = shape(8, 16, 4);
    for workload in [
        Workload::HotShare { percent: 60, experts: 1 },
        Workload::HotShare { percent: 50, experts: 17 },
        Workload::HotShare { percent: 101, experts: 16 },
        Workload::ZipfImbalance(0.5),
        Workload::ZipfImbalance(100.0),
        Workload::ZipfImbalance(f64::NAN),
        Workload::ZipfPower(-1.0),
        Workload::LogNormal(f64::INFINITY),
    ] {
        let error = workload.counts(&shape, 0, 0).unwrap_err();
        assert!(matches!(error, WorkloadError::Impossible { .. }), "{error}");
    }
    let too_many = WorkloadShape { tokens_per_rank: u32::MAX, ..shape.clone() };
    for (shape, expected) in
        [(WorkloadShape { topk: 17, ..shape.clone() }, "17"), (too_many, "assignments"), (shape, "steps")]
    {
        let error = Workload::Balanced.trace(&shape, 1, usize::from(expected != "steps")).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

proptest! {
    #[test]
    fn any_shape_gives_a_workload(
        ranks in 1usize..9,
        experts in 1usize..12,
        topk in 1usize..12,
        tokens in 0u32..50,
        seed in any::<u64>(),
        step in 0usize..30,
    ) {
        let topology = Topology::uniform(ranks, 3).unwrap();
        let topk = topk.min(experts);
        let shape = WorkloadShape { topology, num_experts: experts, topk, tokens_per_rank: tokens, seed };
        for workload in all() {
            match workload.counts(&shape, 0, step) {
                Ok(counts) => {
                    prop_assert_eq!(counts.total(), (ranks * topk) as u64 * u64::from(tokens));
                    for rank in 0..ranks {
                        let own = counts.row(rank).iter().sum::<u32>() as usize / topk;
                        prop_assert!(counts.row(rank).iter().all(|&n| n as usize <= own), "{}", workload);
                    }
                }
                Err(error) => prop_assert!(matches!(error, WorkloadError::Impossible { .. }), "{}", error),
            }
        }
    }
}
