//! The number of ranks, the planner and the schedule change nothing but the speed.

use burn_fsep_planner::tools::trace::Trace;

use crate::common::{losses, summary};

#[test]
fn losses_do_not_depend_on_ranks_or_planner() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.csv").display().to_string();
    let dense = summary(folder.path(), &["--dense"]);
    let mut keys: Vec<&String> = dense.as_object().unwrap().keys().collect();
    keys.sort();
    let expected = [
        "imbalance_planned",
        "imbalance_static",
        "ranks",
        "seconds",
        "steps",
        "tokens_per_second",
        "tokens_per_second_after_warmup",
        "train_loss",
        "unigram_entropy",
        "valid_loss",
    ];
    assert_eq!(keys, expected);
    for options in [
        vec!["--ranks", "1"],
        vec!["--ranks", "2", "--planner", "paper", "--synchronous"],
        vec!["--ranks", "4", "--planner", "min-max", "--slots", "3", "--record-trace", &trace],
        vec!["--ranks", "4", "--planner", "static"],
    ] {
        let ours = summary(folder.path(), &options);
        for loss in ["train_loss", "valid_loss"] {
            let (ours, dense) = (ours[loss].as_f64().unwrap(), dense[loss].as_f64().unwrap());
            assert!((ours - dense).abs() <= 1e-4 * dense, "{options:?}: {loss} {ours} against {dense}");
        }
        assert_eq!(ours["steps"], 12);
        assert!(ours["imbalance_planned"].as_f64().unwrap() >= 1.0);
    }
    let trace = Trace::from_csv(&std::fs::read_to_string(trace).unwrap()).unwrap();
    assert_eq!((trace.num_ranks(), trace.num_experts(), trace.layers()), (4, 4, vec![0, 1]));
    assert_eq!(trace.steps(1).count(), 12);
    // 4 sequences of 16 bytes, two experts for each byte.
    assert!(trace.steps(1).all(|(_, counts)| counts.total() == 4 * 16 * 2));

    let metrics = std::fs::read_to_string(folder.path().join("out/metrics.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 12);
    assert_eq!(rows[11]["step"], 12);
    assert!(std::fs::read_to_string(folder.path().join("out/curves.html")).unwrap().contains("<svg"));
}

#[test]
fn the_schedule_changes_no_loss() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--ranks", "2", "--synchronous"];
    let hidden = losses(&summary(folder.path(), &options));
    assert_eq!(losses(&summary(folder.path(), &[&options[..], &["--no-prefetch"]].concat())), hidden);
}

#[test]
fn mixed_precision_stays_near_single_precision() {
    let folder = tempfile::tempdir().unwrap();
    for options in [vec!["--dense"], vec!["--ranks", "2"]] {
        let single = losses(&summary(folder.path(), &options));
        let mixed = losses(&summary(folder.path(), &[&options[..], &["--mixed-precision"]].concat()));
        for (mixed, single) in mixed.iter().zip(single) {
            let error = (mixed - single).abs() / single;
            assert!(error > 0.0 && error < 0.01, "{options:?}: {mixed}, not {single}");
        }
    }
}

#[test]
fn forced_shares_decide_the_imbalance() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--ranks", "2", "--planner", "static", "--force-shares", "0.5,0.25,0.25,0"];
    let summary = summary(folder.path(), &options);
    // Rank 0 has experts 0 and 1: three quarters of the tokens, where half would be the mean.
    for imbalance in ["imbalance_static", "imbalance_planned"] {
        assert!((summary[imbalance].as_f64().unwrap() - 1.5).abs() < 1e-9, "{summary}");
    }
    let speeds = ["tokens_per_second", "tokens_per_second_after_warmup"].map(|name| summary[name].as_f64().unwrap());
    assert!(speeds.iter().all(|speed| *speed > 0.0) && speeds[0] != speeds[1]);
}

#[test]
fn a_timeline_has_the_last_steps_of_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("timeline.json").display().to_string();
    summary(folder.path(), &["--ranks", "2", "--timeline", &file]);
    for rank in 0..2 {
        let text = std::fs::read(folder.path().join(format!("timeline.rank{rank}.json"))).unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let spans = trace["traceEvents"].as_array().unwrap();
        assert!(spans.iter().all(|span| span["pid"] == rank));
        // Three steps of two layers.
        assert_eq!(spans.iter().filter(|span| span["name"] == "attention").count(), 3 * 2);
    }
}
