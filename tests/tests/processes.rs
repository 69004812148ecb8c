//! Ranks in processes of their own: what is left of a job when one of them is killed.

#![cfg(unix)]

use std::{
    io::Write,
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use burn_fsep::{
    FsepError, FsepRuntime,
    comm::local::LaunchConfig,
    launch::{LauncherConfig, TOKEN_VARIABLE},
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{
    GradientSync, HandTraining, Launcher, LayoutSource, RankProcesses, launch, task_items, train_by_hand,
};

/// Within this time a survivor has to have ended. Much shorter than any timeout, so that it was no timeout.
const LIMIT: Duration = Duration::from_secs(10);
/// What anything else may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A rank that does this, with these variables.
fn command(task: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rank"));
    command.arg(task).envs(variables.iter().copied());
    command
}

/// All ranks of a job.
fn start(size: usize, task: &str) -> RankProcesses {
    RankProcesses::start(Launcher::Direct, size, &command(task, &[]))
}

/// Waits until a rank has come to `task`.
fn wait_for(job: &mut RankProcesses, rank: usize, task: &str) {
    job.wait_for(rank, &format!("at {task}\n"), PATIENCE);
}

fn expect_error(job: &mut RankProcesses, rank: usize, parts: &[&str]) {
    let (code, said) = (job.end(rank, LIMIT), job.said(rank));
    assert_eq!(code, Some(1), "rank {rank}: {said}");
    assert!(parts.iter().all(|part| said.contains(part)), "rank {rank} does not say {parts:?}: {said}");
}

#[test]
fn survivors_name_the_rank_that_was_killed_and_what_they_were_doing() {
    for task in ["gathers", "sums", "exchanges", "computing"] {
        for victim in [0, 2] {
            let mut job = start(3, task);
            (0..3).for_each(|rank| wait_for(&mut job, rank, task));
            assert!(job.kill(victim));
            for rank in (0..3).filter(|&rank| rank != victim) {
                let named = format!("rank {victim} failed while this rank was in `meeting of layer 4`");
                expect_error(&mut job, rank, &[&named, "its process ended without notice"]);
            }
        }
    }
}

#[test]
fn survivors_in_all_groups_name_the_rank_that_was_killed() {
    for victim in [0, 5] {
        let mut job = start(8, "groups");
        (0..8).for_each(|rank| wait_for(&mut job, rank, "groups"));
        assert!(job.kill(victim));
        for rank in (0..8).filter(|&rank| rank != victim) {
            let named = format!("rank {victim} failed while this rank was in `meeting of layer 4`");
            expect_error(&mut job, rank, &[&named, "its process ended without notice"]);
        }
    }
}

#[test]
fn a_rank_that_waits_for_another_hears_of_the_loss_of_a_third() {
    let mut job = start(3, "third");
    (0..2).for_each(|rank| wait_for(&mut job, rank, "third"));
    assert!(job.kill(1));
    expect_error(&mut job, 0, &["rank 1 failed while this rank was in `meeting of layer 4`"]);
    expect_error(&mut job, 2, &["rank 1 failed"]);
}

#[test]
fn a_rank_that_hangs_does_not_keep_the_loss_of_another_secret() {
    use nix::{sys::signal, unistd::Pid};
    let mut job = start(3, "third");
    (0..2).for_each(|rank| wait_for(&mut job, rank, "third"));
    signal::kill(Pid::from_raw(job.process(2).unwrap() as i32), signal::Signal::SIGSTOP).unwrap();
    assert!(job.kill(1));
    expect_error(&mut job, 0, &["rank 1 failed while this rank was in `meeting of layer 4`"]);
}

#[test]
fn a_training_job_that_loses_a_rank_ends() {
    for victim in 0..2 {
        let mut job = start(2, "endless training");
        (0..2).for_each(|rank| wait_for(&mut job, rank, "endless training"));
        // Somewhere within the steps.
        std::thread::sleep(Duration::from_millis(300 + 50 * victim as u64));
        assert!(job.kill(victim));
        expect_error(&mut job, 1 - victim, &[&format!("rank {victim} failed while this rank was in")]);
    }
}

#[test]
fn a_rank_killed_while_the_ranks_meet_is_named() {
    for (victim, survivor) in [(1, 0), (0, 1)] {
        // Rank 2 is never started.
        let mut job = RankProcesses::new(3);
        (0..2).for_each(|rank| job.start_rank(rank, &command("meeting", &[])));
        (0..2).for_each(|rank| wait_for(&mut job, rank, "meeting"));
        // Until they have met, too.
        std::thread::sleep(Duration::from_secs(2));
        assert!(job.kill(victim));
        expect_error(&mut job, survivor, &[&format!("rank {victim} was lost while the ranks were connecting")]);
    }
}

#[test]
fn a_rank_killed_at_any_moment_of_the_start_is_named() {
    for round in 0..10 {
        let victim = round % 3;
        let mut job = RankProcesses::new(3);
        (0..3).for_each(|rank| job.start_rank(rank, &command("gathers", &[("RENDEZVOUS_SECONDS", "6")])));
        std::thread::sleep(Duration::from_millis(4 * round as u64));
        assert!(job.kill(victim));
        for rank in (0..3).filter(|&rank| rank != victim) {
            let (code, said) = (job.end(rank, LIMIT + Duration::from_secs(6)), job.said(rank));
            assert_eq!(code, Some(1), "rank {rank}: {said}");
            // Whoever had not met the victim yet waited for it.
            let lost =
                said.contains(&format!("rank {victim} failed")) || said.contains(&format!("rank {victim} was lost"));
            let missed = said.contains(&format!("rank(s) [{victim}] did not come"))
                || said.contains(&format!("rank {victim} could not be reached"));
            assert!(lost || missed, "victim {victim}, rank {rank}: {said}");
        }
    }
}

#[test]
fn ranks_that_were_never_started_are_named() {
    let variables = [("RENDEZVOUS_SECONDS", "5")];
    let mut job = RankProcesses::new(4);
    [0, 2].into_iter().for_each(|rank| job.start_rank(rank, &command("meeting", &variables)));
    for rank in [0, 2] {
        expect_error(&mut job, rank, &["rank(s) [1, 3] did not come within 5s"]);
    }
    let mut job = RankProcesses::new(2);
    job.start_rank(1, &command("meeting", &variables));
    expect_error(&mut job, 1, &["rank 0 could not be reached at `127.0.0.1:"]);
}

#[test]
fn a_crowd_of_strangers_keeps_nobody_out() {
    let mut job = RankProcesses::new(3);
    job.start_rank(0, &command("meeting", &[("RENDEZVOUS_SECONDS", "120")]));
    wait_for(&mut job, 0, "meeting");
    let address = ("127.0.0.1", job.port());
    let connect = || {
        let start = Instant::now();
        loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < LIMIT, "rank 0 does not listen: {error}"),
            }
        }
    };
    let kinds: [&[u8]; 4] = [b"", b"FSEPrank", b"garbage of a stranger", b"F"];
    let stranger = |bytes: &[u8]| {
        let mut stream = connect();
        let _ = stream.write_all(bytes);
        stream
    };
    // Some go at once, and some are still there when the ranks come.
    kinds.iter().cycle().take(2000).for_each(|bytes| drop(stranger(bytes)));
    let open: Vec<_> = kinds.iter().cycle().take(200).map(|bytes| stranger(bytes)).collect();
    (1..3).for_each(|rank| job.start_rank(rank, &command("meeting", &[])));
    for rank in 0..3 {
        let (code, said) = (job.end(rank, LIMIT), job.said(rank));
        assert_eq!(code, Some(0), "rank {rank}: {said}");
    }
    drop(open);
}

#[test]
fn a_rank_that_leaves_or_panics_says_so() {
    let mut job = start(3, "leaving");
    expect_error(&mut job, 0, &["rank 1 failed while this rank was in `meeting of layer 4`", "it left the group"]);
    assert_eq!(job.end(1, LIMIT), Some(0));
    expect_error(&mut job, 2, &["rank 1 failed while this rank was in `meeting of layer 4`", "it left the group"]);

    let mut job = start(3, "panicking");
    for rank in [0, 2] {
        expect_error(&mut job, rank, &["rank 1 failed", "`meeting of layer 4`", "panicked: rank 1 is broken"]);
    }
    assert_eq!(job.end(1, LIMIT), Some(101));
}

#[test]
fn a_process_without_its_variables_says_which() {
    let mut job = RankProcesses::new(1);
    job.start_rank(0, &command("meeting", &[(TOKEN_VARIABLE, "short")]));
    expect_error(&mut job, 0, &["BURN_FSEP_TOKEN: a job token has 16 to 64 bytes, this one has 5"]);
    job.start_rank(0, &command("meeting", &[("WORLD_SIZE", "none")]));
    expect_error(&mut job, 0, &["WORLD_SIZE is `none`"]);
}

/// From what a rank says: their bits.
fn losses_of(said: &str) -> Vec<f32> {
    let numbers = said.trim_start_matches("losses [").trim_end_matches(']');
    numbers.split(", ").map(|bits| f32::from_bits(bits.parse().unwrap())).collect()
}

#[test]
fn processes_train_as_threads_do() {
    let mut job = start(3, "training");
    let losses: Vec<String> = (0..3)
        .map(|rank| {
            wait_for(&mut job, rank, "training");
            let (code, said) = (job.end(rank, PATIENCE), job.said(rank));
            assert_eq!(code, Some(0), "{said}");
            said.lines().last().unwrap().to_string()
        })
        .collect();
    let training = HandTraining {
        steps: 8,
        batch: 8 * 3,
        clip: 1.0,
        layouts: LayoutSource::Planner(PlannerStrategy::MinMax),
        sync: GradientSync::AfterBackward,
    };
    let threads = launch(&LaunchConfig::new(3), |comm| -> Result<String, FsepError> {
        let trained = train_by_hand(&FsepRuntime::new(comm)?, &task_items(8 * 3 * 8, 3), &training)?;
        Ok(format!("losses {:?}", trained.losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>()))
    });
    // LibTorch's products on the CPU may depend on the thread that computes them, and on where its memory begins.
    let tolerance = if cfg!(feature = "libtorch") { 1e-5 } else { 0.0 };
    for (process, thread) in losses.into_iter().zip(threads) {
        let thread = thread.unwrap();
        let [ours, theirs] = [&process, &thread].map(|said| losses_of(said));
        assert_eq!((ours.len(), theirs.len()), (8, 8));
        let differs = |(a, b): (&f32, &f32)| (a - b).abs() > tolerance * b.abs();
        assert!(!ours.iter().zip(&theirs).any(differs), "{process}\n{thread}");
    }
}

#[test]
fn a_launched_job_ends_with_its_ranks() {
    let launcher = |task: &str| LauncherConfig::new(3, env!("CARGO_BIN_EXE_rank")).with_args([task]);
    assert_eq!(launcher("meeting").run().unwrap(), 0);
    // Whichever comes first: the panic, or the error of a rank that heard of it.
    assert!([1, 101].contains(&launcher("panicking").run().unwrap()));
}

/// Open MPI's sometimes does that where a rank is lost while MPI starts.
#[test]
fn an_mpirun_that_stays_after_its_ranks_is_killed() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hanging_mpirun");
    let mut command = Command::new("true");
    command.env("PATH", format!("{folder}:{}", std::env::var("PATH").unwrap()));
    let mut job = RankProcesses::start(Launcher::Mpirun(&[]), 2, &command);
    assert!(job.wait(PATIENCE) < LIMIT, "that is not when the ranks ended");
    assert_eq!(job.mpirun(), (None, String::new()));
}
