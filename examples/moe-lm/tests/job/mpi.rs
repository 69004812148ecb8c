//! Ranks that mpirun starts.

use std::{
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

use crate::common::{curve, losses, small_job, summary};

/// Starts a command as ranks.
fn mpirun(ranks: usize, command: &Command) -> Output {
    // Free a moment ago: rank 0 binds it itself.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().port();
    let mut mpirun = Command::new("mpirun");
    mpirun
        .args(["-n", &ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"])
        .args(["-x", "MASTER_ADDR", "-x", "MASTER_PORT", "-x", "BURN_FSEP_TOKEN"])
        .envs([("MASTER_ADDR", "127.0.0.1"), ("BURN_FSEP_TOKEN", "0123456789abcdef")])
        .env("MASTER_PORT", port.to_string())
        .arg(command.get_program())
        .args(command.get_args());
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"] {
        mpirun.env_remove(name);
    }
    mpirun.output().expect("mpirun (Debian: openmpi-bin)")
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
    let output = mpirun(2, job.arg("--summary").arg(&file));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
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
    let output = mpirun(3, &job);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("error: ")).collect();
    // The first rank may live long enough to tell it, too, and another one to tell that mpirun ended the first.
    assert!(errors.iter().any(|error| error.contains("rank-2")), "{text}");
    assert!(!folder.path().join("out/curves.html").exists());
}

#[test]
fn another_launcher_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().port();
    let rank = |rank: &str| {
        let mut job = mpi_job(folder.path(), &["--timeout", "20"]);
        job.envs([("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")]);
        job.envs([("BURN_FSEP_TOKEN", "0123456789abcdef"), ("MASTER_PORT", &port.to_string())]);
        job
    };
    let mut second = rank("1").stderr(std::process::Stdio::null()).spawn().unwrap();
    let output = rank("0").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && text.contains("start all ranks by one mpirun"), "{text}");
    assert_eq!(second.wait().unwrap().code(), Some(1));
}
