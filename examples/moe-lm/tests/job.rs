//! The whole job, small: the number of ranks and the planner change nothing but the speed.

use std::{path::Path, process::Command};

use burn_fsep_planner::trace::Trace;

/// Runs moe-lm on a small text and returns its summary.
fn summary(folder: &Path, options: &[&str]) -> serde_json::Value {
    let file = folder.join("summary.json");
    let output = small_job(folder, options).arg("--summary").arg(&file).output().unwrap();
    assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// moe-lm with few steps of a small model, and these options or values of options.
fn small_job(folder: &Path, options: &[&str]) -> Command {
    let mut command = job(folder);
    for (name, value) in [
        ("--batch", "4"),
        ("--context", "16"),
        ("--layers", "2"),
        ("--hidden", "16"),
        ("--heads", "2"),
        ("--ffn", "12"),
        ("--experts", "4"),
        ("--steps", "12"),
        ("--valid-batches", "2"),
        ("--sample", "8"),
    ] {
        if !options.contains(&name) {
            command.args([name, value]);
        }
    }
    command.args(options);
    command
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

/// Numbers of a summary that do not depend on time.
fn losses(summary: &serde_json::Value) -> [f64; 2] {
    ["train_loss", "valid_loss"].map(|loss| summary[loss].as_f64().unwrap())
}

#[test]
fn a_job_that_was_stopped_goes_on_also_with_other_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let undisturbed = losses(&summary(folder.path(), &["--ranks", "2", "--synchronous"]));
    // Another folder for the text, which is the same.
    let folder = tempfile::tempdir().unwrap();
    let options = ["--ranks", "2", "--synchronous", "--checkpoint-every", "5", "--keep", "3", "--resume", "auto"];
    let first = summary(folder.path(), &options);
    assert_eq!(losses(&first), undisturbed, "checkpoints change nothing");
    let checkpoints = folder.path().join("out/checkpoints");
    let mut names: Vec<_> =
        std::fs::read_dir(&checkpoints).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["000001-step-00000005", "000002-step-00000010", "000003-step-00000012"]);

    let rows = || std::fs::read_to_string(folder.path().join("out/metrics.jsonl")).unwrap().lines().count();
    for (ranks, resume) in [("2", names[0].as_str()), ("4", names[0].as_str()), ("1", "auto")] {
        if resume == "auto" {
            // The newest that is whole is the second.
            std::fs::remove_file(checkpoints.join(&names[2]).join("manifest.json")).unwrap();
        }
        let path = if resume == "auto" { resume.into() } else { checkpoints.join(resume).display().to_string() };
        let resumed = losses(&summary(folder.path(), &["--ranks", ranks, "--resume", &path]));
        for (ours, expected) in resumed.iter().zip(undisturbed) {
            assert!((ours - expected).abs() <= 1e-4 * expected, "{resume}, {ranks} ranks: {ours}, not {expected}");
        }
        assert_eq!(rows(), 12, "rows before the checkpoint are kept, later ones written anew");
    }
    // Killed in validation: nothing but that is left. Its metrics may be lost.
    let second = summary(folder.path(), &["--ranks", "2", "--checkpoint-every", "12"]);
    std::fs::remove_file(folder.path().join("out/metrics.jsonl")).unwrap();
    let resumed = summary(folder.path(), &["--ranks", "4", "--resume", "auto"]);
    let [ours, expected] = [&resumed, &second].map(|summary| summary["valid_loss"].as_f64().unwrap());
    assert!((ours - expected).abs() <= 1e-4 * expected, "{ours}, not {expected}");
    for (options, named) in [
        (["--batch", "8", "--resume", "auto"], "that training was another one"),
        (["--hidden", "32", "--resume", "auto"], "does not fit the model"),
        (["--planner", "paper", "--resume", "nothing"], "manifest.json"),
    ] {
        let output = small_job(folder.path(), &options).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains(named), "{options:?}: {message}");
    }
}

#[cfg(unix)]
#[test]
fn a_job_that_is_told_to_stop_saves_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = folder.path().join("out/metrics.jsonl");
    let started = || std::fs::read_dir(folder.path().join("out/rank-0/train")).is_ok();
    // More steps than can be done before the signal comes.
    let options = ["--ranks", "2", "--steps", "100000", "--checkpoint-every", "90000"];
    let mut job = small_job(folder.path(), &options)
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !started() && job.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let killed = Command::new("kill").arg(job.id().to_string()).status().unwrap();
    assert!(killed.success());
    let output = job.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && message.contains("stopped after a checkpoint"), "{message}");
    let saved = burn_fsep::checkpoint::list(folder.path().join("out/checkpoints")).unwrap();
    assert_eq!(saved.len(), 1);
    let step = burn_fsep::checkpoint::verify(&saved[0]).unwrap().progress.step;
    assert_eq!(std::fs::read_to_string(metrics).unwrap().lines().count() as u64, step);
}
