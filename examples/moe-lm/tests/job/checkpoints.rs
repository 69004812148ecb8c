//! Jobs that stop and go on.

#[cfg(unix)]
use std::{path::Path, process::Command};

use crate::common::{losses, small_job, summary};

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

/// What a job says and leaves that was told to stop.
#[cfg(unix)]
pub fn assert_stopped(folder: &Path, output: &std::process::Output) {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(128 + 15), "{message}");
    let told = message.lines().filter(|line| line.contains("stopped after a checkpoint")).count();
    assert!(told == 1 && !message.contains("error: ") && !message.contains("panicked"), "{message}");
    let saved = burn_fsep::checkpoint::list(folder.join("out/checkpoints")).unwrap();
    assert_eq!(saved.len(), 1);
    let step = burn_fsep::checkpoint::verify(&saved[0]).unwrap().progress.step;
    let metrics = std::fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count() as u64, step);
}

/// Waits until the ranks of a job train.
#[cfg(unix)]
pub fn wait_for_training(folder: &Path, ranks: usize, job: &mut std::process::Child) {
    let trains = |rank: usize| folder.join(format!("out/rank-{rank}/train")).is_dir();
    while !(0..ranks).all(trains) && job.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[cfg(unix)]
#[test]
fn a_job_that_is_told_to_stop_saves_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    // More steps than can be done before the signal comes.
    let options = ["--ranks", "2", "--steps", "100000", "--checkpoint-every", "90000"];
    let mut job = small_job(folder.path(), &options)
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for_training(folder.path(), 2, &mut job);
    let killed = Command::new("kill").arg(job.id().to_string()).status().unwrap();
    assert!(killed.success());
    assert_stopped(folder.path(), &job.wait_with_output().unwrap());
}
