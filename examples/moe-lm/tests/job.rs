//! The whole job, small: the number of ranks and the planner change nothing but the speed.

use std::{path::Path, process::Command};

use burn_fsep_planner::trace::Trace;

/// Runs moe-lm on a small text and returns its summary.
fn summary(folder: &Path, options: &[&str]) -> serde_json::Value {
    let file = folder.join("summary.json");
    let output = job(folder)
        .args(["--batch", "4", "--context", "16", "--layers", "2", "--hidden", "16", "--heads", "2", "--ffn", "12"])
        .args(["--experts", "4", "--steps", "12", "--valid-batches", "2", "--sample", "8", "--summary"])
        .arg(&file)
        .args(options)
        .output()
        .unwrap();
    assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn job(folder: &Path) -> Command {
    let text = folder.join("text.txt");
    let words = ["to be ", "or not ", "to bee ", "that is ", "the question ", "\n"];
    std::fs::write(&text, (0..4000).map(|i| words[i * i % 7 % 6]).collect::<String>()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-lm"));
    command.arg("--text").arg(text).arg("--out").arg(folder.join("out"));
    command
}

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
fn bad_options_end_the_job_before_it_begins() {
    let folder = tempfile::tempdir().unwrap();
    for (options, named) in [
        (["--batch", "6", "--ranks", "4"], "--batch 6"),
        (["--context", "90000", "--ranks", "1"], "--context 90000"),
        (["--planner", "best", "--ranks", "1"], "min-max"),
    ] {
        let output = job(folder.path()).args(options).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains(named), "{options:?}: {message}");
        assert!(!folder.path().join("out").exists(), "{options:?}");
    }
}
