//! The README's program runs as it stands, however it is started.

use std::{collections::BTreeMap, process::Command};

#[cfg(unix)]
use burn_fsep::launch::LauncherConfig;
#[cfg(feature = "mpi")]
use burn_fsep_tests::Launcher;
#[cfg(unix)]
use burn_fsep_tests::RankProcesses;

const RANKS: usize = 4;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_minimal"))
}

/// Checks that so many ranks have trained together: three steps each, with the same mean losses.
fn assert_trained(said: &str, ranks: usize) {
    let mut losses: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for line in said.lines().filter_map(|line| line.strip_prefix("rank ")) {
        let (rank, loss) = line.split_once(&format!(" of {ranks}: loss ")).unwrap_or_else(|| panic!("{said}"));
        losses.entry(rank.parse().unwrap()).or_default().push(loss);
    }
    assert!(losses.keys().copied().eq(0..ranks), "{said}");
    assert!(losses.values().all(|of_rank| of_rank.len() == 3 && *of_rank == losses[&0]), "{said}");
}

#[test]
fn it_is_what_the_readme_shows() {
    let readme = include_str!("../../README.md");
    let program = include_str!("../../burn-fsep/examples/minimal.rs");
    let shown = readme.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    assert_eq!(shown, program.split_once("\n\n").unwrap().1, "after its first line of documentation");
    assert!(shown.lines().count() <= 30, "{} lines", shown.lines().count());
}

#[test]
fn as_threads() {
    let output = program().output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_trained(&String::from_utf8_lossy(&output.stdout), RANKS);
}

#[cfg(unix)]
#[test]
fn under_fsep_launch() {
    let folder = tempfile::tempdir().unwrap();
    let file = format!("{}/rank-$RANK.txt", folder.path().display());
    let launcher = LauncherConfig::new(3, "sh")
        .with_args(["-c", &format!("exec {} > {file} 2>&1", env!("CARGO_BIN_EXE_minimal"))]);
    assert_eq!(launcher.run().unwrap(), 0);
    let said = (0..3).map(|rank| std::fs::read_to_string(folder.path().join(format!("rank-{rank}.txt"))).unwrap());
    assert_trained(&said.collect::<String>(), 3);
}

/// Ranks that were started have trained.
#[cfg(unix)]
fn assert_ranks_trained(mut ranks: RankProcesses) {
    ranks.wait(std::time::Duration::from_secs(120));
    let said: String = (0..RANKS).map(|rank| ranks.said(rank)).collect();
    assert!((0..RANKS).all(|rank| ranks.code(rank).is_none_or(|code| code == 0)), "{}", ranks.all_said());
    assert_trained(&said, RANKS);
}

/// With the variables of torchrun, whose agent listens on `MASTER_PORT`.
#[cfg(unix)]
#[test]
fn under_torchrun() {
    let mut ranks = RankProcesses::new(RANKS);
    let _agent = std::net::TcpListener::bind(("127.0.0.1", ranks.port())).unwrap();
    for rank in 0..RANKS {
        ranks.start_rank(
            rank,
            program()
                .envs([("LOCAL_WORLD_SIZE", "4"), ("GROUP_RANK", "0"), ("TORCHELASTIC_RUN_ID", "none")])
                .env("TORCHELASTIC_USE_AGENT_STORE", "True"),
        );
    }
    assert_ranks_trained(ranks);
}

#[cfg(feature = "mpi")]
#[test]
fn under_mpirun() {
    let ranks = RankProcesses::start(Launcher::Mpirun(&[]), RANKS, &program());
    assert_ranks_trained(ranks);
}
