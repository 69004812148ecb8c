//! `memory` from the command line.
#![cfg(feature = "cli")]

use std::{path::Path, process::Command};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/simulate");

/// Runs `fsep-planner memory` in the folder of the examples; standard output or standard error.
fn memory(line: &str) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsep-planner"));
    let output = command.current_dir(Path::new(EXAMPLES)).arg("memory").args(line.split(' ')).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

/// The number in the row of this name.
fn row(table: &str, name: &str) -> f64 {
    let line = table.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {table}"));
    line.split_whitespace().last().unwrap().parse().unwrap()
}

#[test]
fn a_job_that_fits_is_told_and_one_that_does_not_is_refused_with_what_to_change() {
    let job = "--cluster h100-dgx.json --model olmoe-1b-7b.json";
    let table = memory(&format!("{job} --groups 8")).unwrap();
    assert!(table.contains("it fits"), "{table}");
    // 6.44 billion parameters of experts in f32 over 8 ranks.
    assert!((row(&table, "parameters, expert shards") - 3.0).abs() < 0.001);
    let zero = memory(&format!("{job} --groups 8 --zero")).unwrap();
    let state = |table: &str| row(table, "optimizer state, replicated");
    assert!((state(&zero) / state(&table) - 1.0 / 64.0).abs() < 0.001, "{zero}");
    let error = memory(&format!("{job} --groups 1")).unwrap_err();
    assert!(error.contains("What would fit: groups of") && error.contains("optimizer state, expert shards"), "{error}");
    let error = memory(&format!("{job} --groups 8 --imbalance 1000")).unwrap_err();
    assert!(error.contains("micro-batches of fewer tokens") || error.contains("No change"), "{error}");
}

#[test]
fn files_from_before_are_read() {
    let table = memory("--cluster a100-4x8.json --model mixtral-8x7b-e8k2.json").unwrap();
    assert!(table.contains("no memory_bytes_per_rank"), "{table}");
}

#[test]
fn bad_options_are_named() {
    let job = "--cluster h100-dgx.json --model olmoe-1b-7b.json";
    for (options, expected) in [
        ("--groups 0", "--groups: `groups` is 0"),
        ("--groups 7", "--groups: `groups` is 7, expected a divisor of the 64 ranks"),
        ("--groups 128", "--groups"),
        ("--imbalance 0.5", "--imbalance: `imbalance` is 0.5"),
        ("--imbalance NaN", "--imbalance"),
        ("--constants none.json", "none.json"),
    ] {
        let error = memory(&format!("{job} {options}")).unwrap_err();
        assert!(error.contains(expected) && !error.contains("panicked"), "{options}: {error}");
    }
}
