//! The command `fsep-launch`, with shells in place of ranks.

#![cfg(unix)]

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// No job here takes long; one that does hangs.
const LIMIT: Duration = Duration::from_secs(20);

fn command(ranks: usize, options: &[&str], script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsep-launch"));
    command.args(["--ranks", &ranks.to_string()]).args(options).args(["--", "sh", "-c", script]);
    command
}

fn launch(ranks: usize, options: &[&str], script: &str) -> Output {
    let start = Instant::now();
    let output = command(ranks, options, script).output().unwrap();
    assert!(start.elapsed() < LIMIT, "{script}");
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Starts a job whose ranks print a process id each; returns these.
fn start(ranks: usize, options: &[&str], script: &str) -> (Child, BufReader<std::process::ChildStdout>, Vec<Pid>) {
    let mut child = command(ranks, options, script).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let pids = (0..ranks).map(|_| {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        Pid::from_raw(line.split_whitespace().last().unwrap().parse().unwrap())
    });
    let pids = pids.collect();
    (child, lines, pids)
}

fn is_alive(pid: Pid) -> bool {
    // A zombie is dead, whoever may have to notice.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn assert_dead(pids: &[Pid]) {
    let start = Instant::now();
    while pids.iter().any(|&pid| is_alive(pid)) {
        assert!(start.elapsed() < LIMIT, "{pids:?} live on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn ranks_get_their_variables_and_a_common_secret() {
    let script = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $BURN_FSEP_TOKEN \
                  ${OMPI_COMM_WORLD_RANK-unset}; echo err >&2";
    let output = command(3, &["--master-port", "29511"], script).env("OMPI_COMM_WORLD_RANK", "7").output().unwrap();
    assert!(output.status.success());
    let mut lines: Vec<String> = text(&output.stdout).lines().map(str::to_string).collect();
    lines.sort();
    let token = lines[0].split(' ').nth(8).unwrap().to_string();
    assert_eq!(token.len(), 64);
    for (rank, line) in lines.iter().enumerate() {
        assert_eq!(*line, format!("[rank {rank}] {rank} 3 {rank} 3 127.0.0.1 29511 {token} unset"));
    }
    let errors = text(&output.stderr);
    assert!((0..3).all(|rank| errors.contains(&format!("[rank {rank}] err"))), "{errors}");
    let again = launch(1, &[], "echo $BURN_FSEP_TOKEN");
    assert!(!text(&again.stdout).contains(&token), "the secret of two jobs is the same");
}

#[test]
fn the_exit_code_is_that_of_the_first_failure() {
    let output = launch(3, &[], "if [ $RANK = 1 ]; then exit 7; fi; sleep 5; exit $((RANK + 20))");
    assert_eq!(output.status.code(), Some(7));
    let errors = text(&output.stderr);
    assert!(errors.contains("rank 1 ended with exit code 7") && errors.contains("have 35s"), "{errors}");
    let output = launch(2, &[], "if [ $RANK = 0 ]; then kill -9 $$; fi; sleep 0.2");
    assert_eq!(output.status.code(), Some(128 + 9));
    assert!(text(&output.stderr).contains("rank 0 was killed by SIGKILL"));
}

#[test]
fn ranks_that_do_not_end_are_killed_with_what_they_started() {
    let script = "sleep 1000 & echo $!; if [ $RANK = 1 ]; then exit 3; fi; wait";
    let (mut child, _, pids) = start(2, &["--grace", "1"], script);
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert_dead(&pids);
}

#[test]
fn nothing_outlives_a_launcher_that_is_killed() {
    let (mut child, _, pids) = start(3, &[], "echo $$; exec sleep 1000");
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_dead(&pids);
}

#[test]
fn signals_are_passed_on() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let script = "trap 'echo stopped; exit 9' INT TERM; echo $$; while :; do sleep 0.05; done";
        let (mut child, lines, pids) = start(2, &[], script);
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(9));
        assert_eq!(lines.lines().filter(|line| line.as_ref().unwrap().ends_with("stopped")).count(), 2);
        assert_dead(&pids);
    }
}

#[test]
fn ranks_that_end_as_they_were_told_are_no_failure() {
    for (script, says) in [
        ("trap 'exit 143' TERM; echo $$; while :; do sleep 0.05; done", false),
        ("echo $$; exec sleep 1000", false),
        ("trap 'exit 9' TERM; echo $$; while :; do sleep 0.05; done", true),
    ] {
        let (child, _lines, _) = start(2, &[], script);
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        let output = child.wait_with_output().unwrap();
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(if says { 9 } else { 128 + 15 }), "{errors}");
        let told = ["ended with exit code", "was killed by", "did not end"].iter().any(|part| errors.contains(part));
        assert!(errors.contains("SIGTERM: passed on") && told == says, "{errors}");
    }
}

#[test]
fn the_second_signal_kills() {
    let (mut child, _, pids) = start(2, &[], "trap '' TERM; echo $$; while :; do sleep 0.05; done");
    let pid = Pid::from_raw(child.id() as i32);
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < LIMIT);
        // Signals that come at once are one.
        kill(pid, Signal::SIGTERM).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(child.wait().unwrap().code(), Some(128 + 9));
    assert_dead(&pids);
}

#[test]
fn a_launcher_that_was_started_deaf_stays_so() {
    let job = ["--ranks", "2", "--", "sh", "-c", "echo started; sleep 1; exit 4"];
    let mut child = Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_fsep-launch")])
        .args(job)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGHUP).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

#[test]
fn what_cannot_start_is_named() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsep-launch"));
    let output = command.args(["--ranks", "2", "--", "/no/such/program"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    let errors = text(&output.stderr);
    assert!(errors.contains("rank 0: `/no/such/program` cannot be started"), "{errors}");
}
