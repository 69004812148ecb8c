//! Ranks that are killed without notice, at any moment: all others end and say whose loss it was, nothing is left of the job,
//! and the next one goes on to the same bits.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use burn_fsep::checkpoint::{list, verify};
use burn_fsep_tests::{Launcher, RankProcesses};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::common::small_job;

/// Within this time all others have to have ended.
const LIMIT: Duration = Duration::from_secs(30);
/// What an undisturbed job may take.
const PATIENCE: Duration = Duration::from_secs(120);
const STEPS: usize = 12;

/// Few tokens and many parameters, so that reshard and optimizer take a share of a step; layouts change, and checkpoints are
/// written most of the time.
const OPTIONS: &str = "--batch 12 --context 8 --hidden 64 --ffn 192 --experts 8 --steps 12 --lr 2e-2 --valid-batches 1 --sample 4 \
                       --synchronous --checkpoint-every 2 --keep 2 --resume auto --rendezvous-timeout 15";

/// When a rank is killed. Shares are of what the phase takes in an undisturbed job.
#[derive(Debug, Clone, Copy)]
enum Moment {
    StartUp {
        share: f64,
    },
    Training {
        share: f64,
    },
    /// After files of so many checkpoints were begun.
    Write {
        number: usize,
        share: f64,
    },
}

type Draw = fn(&mut StdRng) -> Moment;

/// What a rank was doing when it was killed, as the operation shows that the others wait for it in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    StartUp,
    Forward,
    Backward,
    Reshard,
    GradientSync,
    Optimizer,
    BetweenSteps,
    Checkpoint,
}

impl Phase {
    const ALL: [Phase; 8] = [
        Phase::StartUp,
        Phase::Forward,
        Phase::Backward,
        Phase::Reshard,
        Phase::GradientSync,
        Phase::Optimizer,
        Phase::BetweenSteps,
        Phase::Checkpoint,
    ];

    /// What comes before these operations.
    const OPERATIONS: [(&str, Phase); 21] = [
        ("engine of the ranks", Phase::StartUp),
        ("places of ranks", Phase::StartUp),
        ("options of the ranks", Phase::StartUp),
        ("start of MPI", Phase::StartUp),
        ("connection of MPI", Phase::StartUp),
        ("configuration of the runtime", Phase::StartUp),
        ("groups of ranks", Phase::StartUp),
        ("initial values", Phase::StartUp),
        ("list of checkpoints", Phase::StartUp),
        ("manifest of a checkpoint", Phase::StartUp),
        ("content of a checkpoint", Phase::StartUp),
        ("loading of a checkpoint", Phase::StartUp),
        ("gradient reshard", Phase::Reshard),
        (" gradients", Phase::GradientSync),
        ("gradient norm", Phase::GradientSync),
        ("agreement on layouts", Phase::Optimizer),
        ("mean loss", Phase::BetweenSteps),
        ("agreement to go on", Phase::BetweenSteps),
        ("records of groups", Phase::Checkpoint),
        (" of a checkpoint", Phase::Checkpoint),
        ("backward", Phase::Backward),
    ];

    fn of(said: &str) -> Self {
        let Some(operation) = said.split("while this rank was in `").nth(1).and_then(|rest| rest.split('`').next())
        else {
            return Phase::StartUp;
        };
        let known = Self::OPERATIONS.iter().find(|(part, _)| operation.contains(part));
        known.map_or(Phase::Forward, |(_, phase)| *phase)
    }
}

/// A rank that was killed.
struct Kill {
    phase: Phase,
    /// Whether files of a checkpoint were being written.
    is_writing: bool,
    /// Until all others had ended.
    took: Duration,
}

/// A kind of job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    launcher: Launcher,
    size: usize,
    /// Groups of ranks that share the experts.
    groups: usize,
    planner: &'static str,
}

/// What an undisturbed job does.
struct Undisturbed {
    kind: Kind,
    results: Results,
    start: Duration,
    training: Duration,
    write: Duration,
}

/// Losses of all steps as written, and files of the last checkpoint: parameters, optimizer state, the planner's.
#[derive(PartialEq)]
struct Results {
    losses: Vec<String>,
    files: BTreeMap<String, Vec<u8>>,
}

impl Results {
    fn of(folder: &Path) -> Self {
        let metrics = fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap();
        let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].to_string();
        let last = list(checkpoints(folder)).unwrap().pop().unwrap();
        let file = |path: PathBuf| (path.file_name().unwrap().to_str().unwrap().to_string(), fs::read(path).unwrap());
        let files = fs::read_dir(last).unwrap().map(|entry| entry.unwrap().path());
        let tensors = files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        Self { losses: metrics.lines().map(loss).collect(), files: tensors.map(file).collect() }
    }

    fn assert_equal(&self, expected: &Self, what: &str) {
        assert_eq!(self.losses, expected.losses, "{what}");
        let names = |results: &Self| results.files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(expected), "{what}");
        for (name, bytes) in &self.files {
            assert!(*bytes == expected.files[name], "{what}: {name} of the last checkpoint differs");
        }
    }
}

fn checkpoints(folder: &Path) -> PathBuf {
    folder.join("out/checkpoints")
}

/// Checkpoints that are being written, or were when their writer died.
fn partial(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(checkpoints(folder)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.starts_with('.')).collect()
}

/// Whether a rank has begun to train.
fn trains(folder: &Path, rank: usize) -> bool {
    folder.join(format!("out/rank-{rank}/train")).is_dir()
}

fn start(Kind { launcher, size, groups, planner }: Kind, folder: &Path) -> RankProcesses {
    // A batch is a multiple of the ranks.
    let options = if size == 8 { OPTIONS.replace("--batch 12", "--batch 16") } else { OPTIONS.into() };
    let mut job: Command = small_job(folder, &options.split_whitespace().collect::<Vec<_>>());
    job.args(["--expert-parallel-size", &(size / groups).to_string()]);
    let comm = if launcher == Launcher::Direct { "process" } else { "mpi" };
    job.args(["--planner", planner, "--comm", comm]);
    // Of an earlier job in this folder.
    (0..size).for_each(|rank| drop(fs::remove_dir_all(folder.join(format!("out/rank-{rank}")))));
    RankProcesses::start(launcher, size, &job)
}

/// Runs a job to its end.
fn finish(kind: Kind, folder: &Path) -> (Results, String) {
    let mut ranks = start(kind, folder);
    ranks.wait(PATIENCE);
    for rank in 0..kind.size {
        let (code, said) = (ranks.code(rank), ranks.said(rank));
        assert!(code.is_none_or(|code| code == 0) && !said.contains("error: "), "rank {rank}: {code:?}: {said}");
    }
    let said = ranks.said(0);
    // What a killed job left goes before the next checkpoint, which there is unless all steps were done.
    let left = partial(folder);
    assert!(left.is_empty() || said.contains(&format!("going on from step {STEPS}:")), "{left:?} are left: {said}");
    (Results::of(folder), said)
}

/// Runs a job and measures it.
fn undisturbed(kind: Kind) -> Undisturbed {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let begun = Instant::now();
    let mut ranks = start(kind, folder);
    let (mut start, mut writing, mut names) = (None, Duration::ZERO, BTreeSet::new());
    let mut last = Instant::now();
    while !ranks.has_ended() {
        assert!(begun.elapsed() < PATIENCE, "{}", ranks.said(0));
        let partial = partial(folder);
        writing += if partial.is_empty() { Duration::ZERO } else { last.elapsed() };
        last = Instant::now();
        names.extend(partial);
        if start.is_none() && trains(folder, 0) {
            start = Some(begun.elapsed());
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    ranks.wait(LIMIT);
    let start = start.unwrap_or_else(|| panic!("it never trained: {}", ranks.said(0)));
    let (training, write) = (begun.elapsed() - start, writing / names.len().max(1) as u32);
    let results = Results::of(folder);
    assert_eq!(results.losses.len(), STEPS);
    let metrics = fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap();
    let moved = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["moved_slots"] != 0;
    let moves = metrics.lines().skip(2).filter(|line| moved(line)).count();
    println!(
        "{kind:?}, undisturbed: start {start:.1?}, training {training:.1?}, a checkpoint {write:.1?}; layouts \
         change in {moves} of {STEPS} steps"
    );
    assert!(moves >= 2, "layouts hardly change: the planner's history makes no difference");
    Undisturbed { kind, results, start, training, write }
}

/// Kills a rank at a moment. `false` if the job was over before.
fn strike(ranks: &mut RankProcesses, folder: &Path, victim: usize, moment: Moment, times: &Undisturbed) -> bool {
    let begun = Instant::now();
    let mut seen = BTreeSet::new();
    let mut is_there = |ranks: &mut RankProcesses| match moment {
        Moment::StartUp { .. } => ranks.process(victim).is_some(),
        Moment::Training { .. } => trains(folder, victim),
        Moment::Write { number, .. } => {
            seen.extend(partial(folder));
            seen.len() >= number
        }
    };
    while !is_there(ranks) {
        assert!(begun.elapsed() < PATIENCE, "the moment does not come: {}", ranks.said(0));
        if ranks.has_ended() {
            return false;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    std::thread::sleep(match moment {
        Moment::StartUp { share } => times.start.mul_f64(share).saturating_sub(begun.elapsed()),
        Moment::Training { share } => times.training.mul_f64(share),
        Moment::Write { share, .. } => times.write.mul_f64(share),
    });
    ranks.kill(victim)
}

/// Starts a job and kills a rank; checks what all others do then. `None` if the job was over before.
fn lose(folder: &Path, victim: usize, moment: Moment, times: &Undisturbed) -> Option<Kill> {
    let begun = SystemTime::now();
    let mut ranks = start(times.kind, folder);
    if !strike(&mut ranks, folder, victim, moment, times) {
        ranks.wait(LIMIT);
        return None;
    }
    // An earlier job may have left some.
    let is_new = |name: &String| {
        let modified = fs::metadata(checkpoints(folder).join(name)).and_then(|folder| folder.modified());
        modified.is_ok_and(|modified| modified >= begun)
    };
    let is_writing = partial(folder).iter().any(is_new);
    let took = ranks.wait(LIMIT);
    let port = ranks.port();
    assert!(TcpListener::bind(("127.0.0.1", port)).is_ok(), "port {port} is in use after the job");
    let survivors: Vec<_> = (0..times.kind.size).filter(|&rank| rank != victim).collect();
    let said: Vec<_> = survivors.iter().map(|&rank| ranks.said(rank)).collect();
    if said.iter().all(|said| !said.contains("error: ")) && trains(folder, victim) {
        // It had nothing left to do for the others.
        return None;
    }
    for (&rank, said) in survivors.iter().zip(&said) {
        let named = [
            format!("rank {victim} failed"),
            format!("rank {victim} was lost"),
            format!("rank(s) [{victim}] did not come"),
            format!("rank {victim} could not be reached"),
        ];
        let is_named = |line: &str| {
            line.strip_prefix("error: ").is_some_and(|error| named.iter().any(|named| error.starts_with(named)))
        };
        let code = ranks.code(rank);
        assert!(code.is_none_or(|code| code == 1), "rank {rank}, {victim} was killed: {code:?}: {said}");
        assert!(said.lines().any(is_named), "rank {rank}, {victim} was killed: {said}");
    }
    for checkpoint in list(checkpoints(folder)).unwrap() {
        verify(&checkpoint).unwrap_or_else(|error| panic!("a half-written checkpoint: {error}"));
    }
    // Who was the furthest says most.
    let phase = said.iter().map(|said| Phase::of(said)).max().unwrap();
    Some(Kill { phase, is_writing, took })
}

/// The step that a job goes on from.
fn newest(folder: &Path) -> u64 {
    list(checkpoints(folder)).unwrap().pop().map_or(0, |newest| verify(newest).unwrap().progress.step)
}

/// Kills a rank at each of the moments, one job after the other in one folder; then lets a job go on to the end, and
/// compares.
fn round(name: &str, rng: &mut StdRng, times: &Undisturbed, moments: &[Draw]) -> Vec<Kill> {
    let folder = tempfile::tempdir().unwrap();
    let (kind, folder) = (times.kind, folder.path());
    let mut kills = Vec::new();
    for draw in moments {
        // A few draws come too late.
        let kill = (0..20).find_map(|_| {
            let (victim, moment) = (rng.random_range(0..times.kind.size), draw(rng));
            let kill = lose(folder, victim, moment, times);
            match &kill {
                Some(Kill { phase, is_writing, took }) => println!(
                    "{name}: {kind:?}, rank {victim} killed at {moment:?}: {phase:?}{}, the others ended in \
                     {took:.2?}, step {}",
                    if *is_writing { ", writing" } else { "" },
                    newest(folder),
                ),
                None => {
                    println!("{name}: {kind:?}, rank {victim} was to be killed at {moment:?}: too late");
                    let _ = fs::remove_dir_all(folder.join("out"));
                }
            }
            kill
        });
        kills.push(kill.expect("a moment before the end"));
    }
    let step = newest(folder);
    let (results, said) = finish(kind, folder);
    let goes_on = said.contains(&format!("going on from step {step}:"));
    assert!(goes_on || step == 0, "{name}: not from the newest checkpoint, of step {step}: {said}");
    results.assert_equal(&times.results, name);
    kills
}

fn start_up(rng: &mut StdRng) -> Moment {
    Moment::StartUp { share: rng.random_range(0.0..1.0) }
}

fn training(rng: &mut StdRng) -> Moment {
    Moment::Training { share: rng.random_range(0.0..0.9) }
}

fn write(rng: &mut StdRng) -> Moment {
    Moment::Write { number: rng.random_range(1..STEPS / 2), share: rng.random_range(0.0..1.0) }
}

#[test]
fn a_kill_at_start_in_a_step_and_in_a_checkpoint_costs_nothing_but_steps() {
    for (size, groups, moments) in [(3, 1, &[start_up as Draw, training, write][..]), (4, 2, &[training])] {
        let times = undisturbed(Kind { launcher: Launcher::Direct, size, groups, planner: "min-max" });
        round("short", &mut StdRng::seed_from_u64(0), &times, moments);
    }
}

/// `cargo test -p moe-lm --features moe-lm/mpi --test job kills -- --ignored --nocapture`. One round again:
/// `MOE_LM_ROUND=17`; others: `MOE_LM_SEED=2`. With `MOE_LM_GROUPS=2` jobs of eight ranks in two groups.
#[test]
#[ignore = "takes minutes"]
fn fifty_random_kills() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let (seed, only) = (number("MOE_LM_SEED").unwrap_or(1), number("MOE_LM_ROUND"));
    let groups = number("MOE_LM_GROUPS").unwrap_or(1) as usize;
    let rounds: [&[Draw]; 9] = [
        &[start_up],
        &[training],
        &[write],
        &[training],
        // Of a job that goes on.
        &[training, start_up],
        &[training],
        &[write],
        &[training],
        &[write],
    ];
    let (mut kills, mut undisturbed_jobs) = (Vec::new(), HashMap::new());
    let begun = Instant::now();
    // Fifty, and as many more as it takes until each phase has had some.
    let covers = |kills: &[(Launcher, Kill)], least: usize| {
        Phase::ALL.iter().all(|phase| kills.iter().filter(|(_, kill)| kill.phase == *phase).count() >= least)
    };
    for number in 0..200 {
        if kills.len() >= 50 && covers(&kills, 2) || only.is_some_and(|only| number > only) {
            break;
        }
        let mut rng = StdRng::seed_from_u64(seed << 32 | number);
        let is_mpi = cfg!(feature = "mpi") && number % 4 == 3;
        let launcher = if is_mpi { Launcher::RECOVERING_MPIRUN } else { Launcher::Direct };
        let planner = ["min-max", "paper"][number as usize / 4 % 2];
        let size = if groups == 1 { rng.random_range(2..=4) } else { 8 };
        let kind = Kind { launcher, size, groups, planner };
        if only.is_none_or(|only| number == only) {
            let times = undisturbed_jobs.entry(kind).or_insert_with(|| undisturbed(kind));
            let moments = rounds[number as usize % rounds.len()];
            let killed = round(&format!("round {number}, seed {seed}"), &mut rng, times, moments);
            kills.extend(killed.into_iter().map(|kill| (launcher, kill)));
        }
    }
    println!("\n{} kills in {:.0?}\n{:24}kills  MPI  slowest end of the others", kills.len(), begun.elapsed(), "phase");
    let row = |name: &str, is_it: &dyn Fn(&Kill) -> bool| {
        let these: Vec<_> = kills.iter().filter(|(_, kill)| is_it(kill)).collect();
        let slowest = these.iter().map(|(_, kill)| kill.took).max().unwrap_or_default();
        let over_mpi = these.iter().filter(|(launcher, _)| *launcher != Launcher::Direct).count();
        println!("{name:24}{:5}{over_mpi:5}  {slowest:.2?}", these.len());
    };
    Phase::ALL.iter().for_each(|phase| row(&format!("{phase:?}"), &|kill| kill.phase == *phase));
    row("any, files being written", &|kill| kill.is_writing);
    row("all", &|_| true);
    assert!(only.is_some() || covers(&kills, 1), "no kill in some phase: try another MOE_LM_SEED");
}
