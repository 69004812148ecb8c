//! A long job leaks nothing. The 2,000 steps: `cargo test -p moe-lm --test job -- --ignored --nocapture soak::two_thousand_steps`

use std::{
    fs,
    io::{BufRead, BufReader},
    ops::Range,
    path::Path,
    process::{Command, Stdio},
};

use crate::{common::small_job, processes::launcher_of};

const RANKS: usize = 4;
/// What memory may grow from the early to the late steps. The curves that a job keeps to draw them at its end take about 0.3 KiB
/// a step, 0.4 MiB between the two parts of 2,000 steps; the allocator's own reuse varies by some 0.1 MiB. The least tensor of
/// this job is 2 KiB, a layer's restored experts are 72: a leak in every one of 2,000 steps exceeds this. The 200 steps of the
/// usual tests see threads, files and leaked layers.
const TOLERANCE_KIB: usize = 1024;

/// What a process has at some step.
#[derive(Debug, Clone, Copy)]
struct Sample {
    step: usize,
    /// Memory that is in use (VmRSS).
    kib: usize,
    threads: usize,
    files: usize,
}

impl Sample {
    /// `None` if the process has ended: who looks may be late.
    fn of(pid: &str, step: usize) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let files = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
        Some(Self { step, kib: field("VmRSS:")?, threads: field("Threads:")?, files })
    }
}

/// Trains with layouts that are drawn anew for every step; samples of each rank, whenever rank 0 tells its progress.
fn train(folder: &Path, steps: usize) -> Vec<Vec<Sample>> {
    let job = small_job(
        folder,
        &[
            "--comm",
            "process",
            "--planner",
            "random",
            "--synchronous",
            "--steps",
            &steps.to_string(),
            "--experts",
            "8",
            "--batch",
            "16",
            "--hidden",
            "32",
            "--ffn",
            "64",
        ],
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("echo $$ > '{}'/pid-$RANK; exec \"$@\"", folder.display()), "sh"]);
    shell.arg(job.get_program()).args(job.get_args());
    let mut launcher = launcher_of(RANKS, &shell).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();

    let mut samples = vec![Vec::new(); RANKS];
    let mut said = String::new();
    for line in BufReader::new(launcher.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        let step = line.strip_prefix("[rank 0] step ").and_then(|rest| rest.split_once('/'));
        match step.map(|(step, _)| step.parse::<usize>().unwrap()) {
            // At the very end the ranks may be gone.
            Some(step) if step < steps => {
                for (rank, samples) in samples.iter_mut().enumerate() {
                    let pid = fs::read_to_string(folder.join(format!("pid-{rank}"))).unwrap();
                    samples.extend(Sample::of(pid.trim(), step));
                }
            }
            Some(_) => {}
            None => said += &format!("{line}\n"),
        }
    }
    assert!(launcher.wait().unwrap().success(), "{said}");
    samples
}

fn assert_every_step_moved_experts(folder: &Path, steps: usize) {
    let metrics = fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap();
    let moved: Vec<u64> = metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["moved_slots"].as_u64().unwrap())
        .collect();
    assert_eq!(moved.len(), steps);
    // The first step has nothing to plan with.
    let still: Vec<_> = (1..steps).filter(|&step| moved[step] == 0).collect();
    assert!(still.is_empty(), "steps without a new layout: {still:?}");
}

/// Trains and compares what the processes have late with what they had early.
fn assert_flat(steps: usize, early: Range<usize>, late: Range<usize>) {
    let folder = tempfile::tempdir().unwrap();
    let samples = train(folder.path(), steps);
    assert_every_step_moved_experts(folder.path(), steps);
    for (rank, samples) in samples.iter().enumerate() {
        let values = |steps: &Range<usize>, value: fn(&Sample) -> usize| {
            let samples = samples.iter().filter(|sample| steps.contains(&sample.step));
            samples.map(value).collect::<Vec<_>>()
        };
        let most = |steps, value| values(steps, value).into_iter().max().expect("samples");
        // One more may be there for a moment, such as a file that is being written; what is leaked stays.
        let least = |steps, value| values(steps, value).into_iter().min().expect("samples");
        let memory = [&early, &late].map(|steps| most(steps, |sample| sample.kib));
        let threads = [&early, &late].map(|steps| least(steps, |sample| sample.threads));
        let files = [&early, &late].map(|steps| least(steps, |sample| sample.files));
        println!(
            "rank {rank}: in steps {early:?} and {late:?} at most {memory:?} KiB, at least {threads:?} threads, {files:?} files"
        );
        assert!(memory[1] <= memory[0] + TOLERANCE_KIB, "rank {rank} grows: {samples:?}");
        assert!(threads[1] <= threads[0] && files[1] <= files[0], "rank {rank}: {samples:?}");
    }
}

#[test]
fn two_hundred_steps() {
    assert_flat(200, 50..100, 150..200);
}

#[test]
#[ignore = "takes a minute or two"]
fn two_thousand_steps() {
    assert_flat(2000, 200..700, 1500..2000);
}
