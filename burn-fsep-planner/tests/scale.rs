//! `scale`, and `simulate` with groups, from the command line.
#![cfg(feature = "cli")]

use std::{path::Path, process::Command};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/simulate");

/// Runs `fsep-planner` in the folder of the examples; standard output or standard error.
fn run(line: &str) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsep-planner"));
    let output = command.current_dir(Path::new(EXAMPLES)).args(line.split(' ')).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

const JOB: &str = "--cluster h100-dgx.json --model olmoe-1b-7b.json";

#[test]
fn the_best_groups_of_small_experts_stay_in_a_node() {
    let folder = tempfile::tempdir().unwrap();
    let figure = folder.path().join("steps.svg");
    let line = format!("scale {JOB} --ranks 64 --steps 2 --figure {}", figure.display());
    let table = run(&line).unwrap();
    let row = table.lines().find(|line| line.trim_start().starts_with("64 ")).unwrap();
    assert_eq!(row.split_whitespace().nth(1), Some("8"), "{table}");
    assert!(row.ends_with("yes"), "{table}");
    let svg = std::fs::read_to_string(figure).unwrap();
    assert!(svg.contains("ranks that share the experts") && svg.contains("64 ranks"));
    let all = run(&format!("scale {JOB} --ranks 64 --steps 2 --all --most-group-ranks 16")).unwrap();
    assert_eq!(all.lines().filter(|line| line.trim_start().starts_with("64 ")).count(), 5, "{all}");
    assert!(all.contains("best") && all.contains("  no"), "{all}");
    let fixed = run(&format!("scale {JOB} --ranks 64 --steps 2 --most-group-ranks 16 --strategy static")).unwrap();
    assert!(fixed.contains("no size of groups fits"), "the most loaded rank keeps more rows: {fixed}");
}

#[test]
fn a_model_that_fits_nowhere_is_told() {
    let table = run("scale --cluster h100-dgx.json --model deepseek-v3.json --ranks 16 --steps 2").unwrap();
    assert!(table.contains("no size of groups fits"), "{table}");
}

#[test]
fn groups_are_simulated() {
    let seconds = |options: &str| {
        let table = run(&format!("simulate {JOB} --imbalance 1.1 {options}")).unwrap();
        let row = table.lines().find(|line| line.starts_with("given")).unwrap().to_string();
        row.split_whitespace().nth(2).unwrap().parse::<f64>().unwrap()
    };
    assert!(seconds("--groups 8") < seconds("--groups 64"));
    let table = run(&format!("simulate {JOB} --groups 8 --zero --strategy min-max --steps 2 --repair")).unwrap();
    assert!(table.contains("64, in groups of 8"), "{table}");
}

#[test]
fn bad_options_are_named() {
    for (line, expected) in [
        (format!("simulate {JOB} --imbalance 1 --groups 0"), "--groups: `groups` is 0"),
        (format!("simulate {JOB} --imbalance 1 --groups 3"), "--groups: `groups` is 3"),
        (format!("simulate {JOB} --imbalance 1 --groups 128"), "--groups"),
        (format!("scale {JOB} --ranks 0"), "--ranks: `ranks` is 0, expected a multiple of the 8 ranks"),
        (format!("scale {JOB} --ranks 12"), "--ranks"),
        (format!("scale {JOB} --ranks 1000000000000"), "--nodes"),
        (format!("scale {JOB} --ranks 64 --steps 0"), "--steps"),
        (format!("scale {JOB} --ranks 64 --sigma NaN"), "--sigma"),
        (
            "simulate --cluster a100-4x8.json --model mixtral-8x7b-e8k2-megatron.json --imbalance 1 --groups 8".into(),
            "--groups",
        ),
    ] {
        let error = run(&line).unwrap_err();
        assert!(error.contains(expected) && !error.contains("panicked"), "{line}: {error}");
    }
}
