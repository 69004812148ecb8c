//! Ranks that mpirun starts.

use std::{path::Path, process::Command, time::Duration};

use burn_fsep_tests::{Launcher, RankProcesses};

use crate::common::{curve, losses, small_job, summary};

const PATIENCE: Duration = Duration::from_secs(120);

/// Starts a command as ranks, and waits for its end.
fn run(launcher: Launcher, ranks: usize, command: &Command) -> RankProcesses {
    let mut processes = RankProcesses::start(launcher, ranks, command);
    processes.wait(PATIENCE);
    processes
}

fn mpi_job(folder: &Path, options: &[&str]) -> Command {
    let mut job = small_job(folder, options);
    job.args(["--comm", "mpi"]);
    job
}

#[test]
fn mpi_trains_as_threads_do_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let local = summary(folder.path(), &["--ranks", "2", "--synchronous"]);
    let threads = curve(folder.path());
    let file = folder.path().join("mpi.json");
    let mut job = mpi_job(folder.path(), &["--synchronous"]);
    let mut ranks = run(Launcher::Mpirun(&[]), 2, job.arg("--summary").arg(&file));
    assert_eq!(ranks.mpirun().0, Some(0), "{}", ranks.all_said());
    let over_mpi: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!((losses(&over_mpi), over_mpi["ranks"].as_u64()), (losses(&local), Some(2)));
    assert_eq!((curve(folder.path()), threads.len()), (threads, 12));
    assert!((0..2).all(|rank| folder.path().join(format!("out/rank-{rank}/train")).is_dir()));
}

#[test]
fn the_rank_that_fails_says_so_before_mpirun_kills_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let job = mpi_job(folder.path(), &["--batch", "6"]);
    std::fs::create_dir(folder.path().join("out")).unwrap();
    std::fs::write(folder.path().join("out/rank-2"), "not a folder").unwrap();
    let mut ranks = run(Launcher::Mpirun(&[]), 3, &job);
    let text = ranks.all_said();
    assert_eq!(ranks.mpirun().0, Some(1), "{text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("error: ")).collect();
    // The first rank may live long enough to tell it, too, and another one to tell that mpirun ended the first.
    assert!(errors.iter().any(|error| error.contains("rank-2")), "{text}");
    assert!(!folder.path().join("out/curves.html").exists());
}

#[test]
fn another_launcher_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let job = mpi_job(folder.path(), &["--timeout", "20"]);
    let mut ranks = run(Launcher::Direct, 2, &job);
    assert!(ranks.said(0).contains("start all ranks by one mpirun"), "{}", ranks.all_said());
    assert_eq!([ranks.code(0), ranks.code(1)], [Some(1); 2], "{}", ranks.all_said());
}
