//! Ranks that are processes.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use burn_fsep::launch::LauncherConfig;

use crate::{
    checkpoints::{assert_stopped, wait_for_training},
    common::{curve, losses, small_job, summary},
};

/// Not a test: what `fsep-launch` does, in a process of its own.
#[test]
#[ignore = "started by launch"]
fn launcher() {
    let command: Vec<String> = serde_json::from_str(&std::env::var("MOE_LM_COMMAND").unwrap()).unwrap();
    let ranks = std::env::var("MOE_LM_RANKS").unwrap().parse().unwrap();
    let code = LauncherConfig::new(ranks, &command[0]).with_args(&command[1..]).run().unwrap();
    std::process::exit(code.into());
}

/// A launcher that starts a command as ranks.
pub fn launcher_of(ranks: usize, command: &Command) -> Command {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let words: Vec<String> = words.map(|word| word.to_str().unwrap().to_string()).collect();
    let mut launcher = Command::new(std::env::current_exe().unwrap());
    launcher
        .args(["processes::launcher", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("MOE_LM_COMMAND", serde_json::to_string(&words).unwrap())
        .env("MOE_LM_RANKS", ranks.to_string());
    launcher
}

/// Starts a command as ranks and waits for its end.
fn launch(ranks: usize, command: &Command) -> Output {
    launcher_of(ranks, command).output().unwrap()
}

/// A shell that gives one rank other options than the rest.
fn other_options(job: &Command, rank: usize, options: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("if [ $RANK = {rank} ]; then exec \"$@\" {options}; else exec \"$@\"; fi"), "sh"]);
    shell.arg(job.get_program()).args(job.get_args());
    shell
}

fn process_job(folder: &Path, options: &[&str]) -> Command {
    let mut job = small_job(folder, options);
    job.args(["--comm", "process"]);
    job
}

/// What a job of processes puts into its summary.
fn process_summary(ranks: usize, folder: &Path, options: &[&str]) -> serde_json::Value {
    let file = folder.join("summary.json");
    let _ = std::fs::remove_file(&file);
    let mut job = process_job(folder, options);
    let output = launch(ranks, job.arg("--summary").arg(&file));
    assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.matches("validation loss").count(), 1, "{text}");
    assert!(text.contains("[rank 0] validation loss"), "{text}");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn processes_train_as_threads_do_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let local = summary(folder.path(), &["--ranks", "2", "--synchronous"]);
    let threads = curve(folder.path());
    let options = ["--synchronous", "--checkpoint-every", "5", "--keep", "3"];
    let processes = process_summary(2, folder.path(), &options);
    assert_eq!((losses(&processes), processes["ranks"].as_u64()), (losses(&local), Some(2)));
    assert_eq!((curve(folder.path()), threads.len()), (threads.clone(), 12));
    assert!((0..2).all(|rank| folder.path().join(format!("out/rank-{rank}/train")).is_dir()));

    // Checkpoints go on with as many processes bit for bit, with another number up to rounding, and as threads.
    let saved = burn_fsep::checkpoint::list(folder.path().join("out/checkpoints")).unwrap();
    let first = saved.iter().min().unwrap().display().to_string();
    let resumed = process_summary(2, folder.path(), &["--synchronous", "--resume", &first]);
    assert_eq!((losses(&resumed), curve(folder.path())), (losses(&local), threads));
    let others = [
        process_summary(1, folder.path(), &["--resume", &first]),
        summary(folder.path(), &["--ranks", "4", "--resume", &first]),
    ];
    for (ours, expected) in others.iter().flat_map(losses).zip(losses(&local).repeat(2)) {
        assert!((ours - expected).abs() <= 1e-4 * expected, "{ours}, not {expected}");
    }
}

/// Runs a job that has to fail with exit code 1 and one message, which has `part` in it.
fn assert_error(ranks: usize, job: &Command, part: &str) {
    let output = launch(ranks, job);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("error: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains(part), "{part}: {text}");
}

#[test]
fn ranks_with_other_options_do_not_train() {
    let folder = tempfile::tempdir().unwrap();
    let job = process_job(folder.path(), &[]);
    let more_text = format!("--text '{}'", folder.path().join("text.txt").display());
    for (options, what) in [
        ("--no-prefetch", "other options"),
        ("--seed 7", "other options"),
        ("--mixed-precision", "other options"),
        (&more_text, "another text"),
    ] {
        assert_error(2, &other_options(&job, 1, options), &format!("ranks 0 and 1 were started with {what}"));
        assert!(!folder.path().join("out").exists(), "{options}");
    }
}

#[test]
fn the_failure_of_one_rank_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let summary = folder.path().join("summary.json").display().to_string();
    let job = process_job(folder.path(), &["--batch", "6", "--summary", &summary]);
    let out = folder.path().join("out");
    for rank in [0, 2] {
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join(format!("rank-{rank}")), "not a folder").unwrap();
        assert_error(3, &job, &format!("rank-{rank}"));
        assert!(!Path::new(&summary).exists() && !out.join("curves.html").exists());
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_rank_that_is_killed_ends_the_job() {
    let folder = tempfile::tempdir().unwrap();
    let job = process_job(folder.path(), &["--batch", "6", "--steps", "100000"]);
    // Killed once it trains.
    let started = folder.path().join("out/rank-1/train").display().to_string();
    for killed in [1, 0] {
        let script = format!(
            "if [ $RANK = {killed} ]; then (until [ -d '{started}' ]; do sleep 0.05; done; kill -9 $$) & fi; exec \"$@\""
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, "sh"]).arg(job.get_program()).args(job.get_args());
        let output = launch(3, &shell);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // The launcher's code is that of the rank that it saw end first.
        assert!([Some(1), Some(128 + 9)].contains(&output.status.code()), "{text}");
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("error: ")).collect();
        assert_eq!(errors.len(), 2, "{text}");
        for survivor in (0..3).filter(|&rank| rank != killed) {
            let expected = [format!("[rank {survivor}] error: "), format!("rank {killed} failed")];
            let is_told = |error: &&str| expected.iter().all(|part| error.contains(part));
            assert!(errors.iter().any(is_told), "rank {survivor}: {text}");
        }
        std::fs::remove_dir_all(folder.path().join("out")).unwrap();
    }
}

#[test]
fn processes_that_are_told_to_stop_save_a_checkpoint() {
    for told in [None, Some(1)] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let job = process_job(folder, &["--batch", "6", "--steps", "100000", "--checkpoint-every", "90000"]);
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("echo $$ > '{}'/pid-$RANK; exec \"$@\"", folder.display()), "sh"]);
        shell.arg(job.get_program()).args(job.get_args());
        let mut launcher = launcher_of(3, &shell).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_training(folder, 3, &mut launcher);
        // The launcher, which passes it on to all ranks; or one rank, which stops all.
        let pid = match told {
            None => launcher.id().to_string(),
            Some(rank) => std::fs::read_to_string(folder.join(format!("pid-{rank}"))).unwrap(),
        };
        assert!(Command::new("kill").arg(pid.trim()).status().unwrap().success());
        let output = launcher.wait_with_output().unwrap();
        assert_stopped(folder, &output);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("[rank 0] stopped after a checkpoint"), "{text}");
        // They ended as the launcher told them.
        assert!(told.is_some() || !text.contains("ended with exit code"), "{text}");
    }
}
