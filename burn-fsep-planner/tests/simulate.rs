//! `simulate` and `calibrate` from the command line: the example files, and errors that name file, line and expectation.
#![cfg(feature = "cli")]

use std::{path::Path, process::Command};

use burn_fsep_planner::{cost::CostConstants, tools::simulator::MeasuredConstants};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/simulate");

/// Runs `fsep-planner` in a folder; standard output or standard error.
fn run(folder: &Path, line: &str) -> Result<String, String> {
    let output =
        Command::new(env!("CARGO_BIN_EXE_fsep-planner")).current_dir(folder).args(line.split(' ')).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

/// A folder with a small cluster and a small model, made of the examples.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str, changes: &[(&str, &str)]| {
        let text = std::fs::read_to_string(Path::new(EXAMPLES).join(from)).unwrap();
        let text = changes.iter().fold(text, |text, (old, new)| {
            assert!(text.contains(old), "{from} has no {old}");
            text.replace(old, new)
        });
        std::fs::write(folder.path().join(to), text).unwrap();
    };
    copy("a100-4x8.json", "cluster.json", &[("\"nodes\": 4", "\"nodes\": 2")]);
    copy("mixtral-8x7b-e8k2.json", "model.json", &[("\"layers\": 32", "\"layers\": 2")]);
    folder
}

/// Seconds of a step in the row of a strategy.
fn step(table: &str, row: &str) -> f64 {
    let line = table.lines().find(|line| line.starts_with(row)).unwrap();
    line.split_whitespace().nth(2).unwrap().parse().unwrap()
}

#[test]
fn strategies_side_by_side() {
    let folder = folder();
    let table = run(folder.path(), "simulate --cluster cluster.json --model model.json").unwrap();
    let [fixed, paper, ours, balanced] = ["static", "paper", "min-max", "balanced"].map(|row| step(&table, row));
    assert!(balanced <= ours && ours < paper && paper < fixed, "{table}");
    assert_eq!(table, run(folder.path(), "simulate --cluster cluster.json --model model.json").unwrap(), "seeded");
    let one =
        run(folder.path(), "simulate --cluster cluster.json --model model.json --strategy paper --seed 1").unwrap();
    assert!(one.contains("\npaper") && !one.contains("\nstatic"), "{one}");
    let given = run(folder.path(), "simulate --cluster cluster.json --model model.json --imbalance 1.5").unwrap();
    assert!(step(&given, "given") > step(&given, "balanced"), "{given}");
}

#[test]
fn every_example_is_simulated() {
    let folder = Path::new(EXAMPLES);
    let mut models = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with("mixtral") || name.starts_with("qwen") {
            let table = run(folder, &format!("simulate --cluster a100-4x8.json --model {name} --imbalance 1.2"));
            let seconds = step(&table.unwrap(), "given");
            assert!((10.0..40.0).contains(&seconds), "{name}: {seconds} s");
            models += 1;
        }
    }
    assert!(models >= 12);
}

#[test]
fn a_trace_is_simulated() {
    let folder = folder();
    let mut trace = "layer,step,src_rank,expert0,expert1,expert2,expert3,expert4,expert5,expert6,expert7\n".to_string();
    for step in 0..3 {
        for rank in 0..16 {
            trace.push_str(&format!("0,{step},{rank},60,20,15,5,9,9,9,9\n"));
        }
    }
    std::fs::write(folder.path().join("trace.csv"), &trace).unwrap();
    let line = "simulate --cluster cluster.json --model model.json --trace trace.csv";
    let table = run(folder.path(), line).unwrap();
    assert!(step(&table, "min-max") < step(&table, "static"), "{table}");
    let error = run(folder.path(), &format!("{line} --skip-steps 3")).unwrap_err();
    assert!(error.contains("trace.csv") && error.contains("--skip-steps"), "{error}");
    std::fs::write(folder.path().join("trace.csv"), "layer,step,src_rank,expert0\n0,0,0,7\n").unwrap();
    let error = run(folder.path(), line).unwrap_err();
    assert!(error.contains("trace.csv: ranks of the trace: expected 16, got 1"), "{error}");
}

#[test]
fn errors_name_file_line_and_expectation() {
    for (file, old, new, expected) in [
        (
            "model.json",
            "\"layers\": 2",
            "\"layers\": 0",
            "model.json: line 2: `layers` is 0, expected a whole number from 1",
        ),
        ("model.json", "\"layers\": 2", "\"layers\": -1", "line 2 column"),
        ("model.json", "\"layers\": 2", "\"layers\": 99999", "line 2: `layers` is 99999, expected at most"),
        ("model.json", "\"layers\"", "\"layer\"", "unknown field `layer`"),
        ("model.json", "\"topk\": 2", "\"topk\": 9", "line 6: `topk` is 9, expected at most experts = 8"),
        ("model.json", "\"recompute\": true", "\"recompute\": 1", "expected a boolean"),
        ("model.json", "\n}", "", "EOF"),
        ("model.json", "\"topk\": 2,", "", "missing field `topk`"),
        ("model.json", "\"slots_per_rank\": 2", "\"slots_per_rank\": 9", "lower slots per rank"),
        ("cluster.json", "\"nodes\": 2", "\"nodes\": 0", "cluster.json: line 2: `nodes`"),
        ("cluster.json", "\"nodes\": 2", "\"nodes\": 999999999", "line 2: `nodes` is 999999999, expected at most"),
        ("cluster.json", "\"straggler_factor\": 1.", "\"straggler_factor\": -1.", "`straggler_factor` is -1"),
        ("cluster.json", "\"inter_node_ports\": 1", "\"inter_node_ports\": 9", "expected 1 to ranks_per_node = 8"),
        ("cluster.json", "8192.0", "null", "expected f64"),
    ] {
        let folder = folder();
        let path = folder.path().join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(old), "{file} has no {old}");
        std::fs::write(&path, text.replace(old, new)).unwrap();
        let error = run(folder.path(), "simulate --cluster cluster.json --model model.json").unwrap_err();
        assert!(error.contains(file) && error.contains(expected), "{new}: {error}");
    }
    let folder = folder();
    for (options, expected) in [
        ("--imbalance 0.5", "--imbalance"),
        ("--imbalance NaN", "from 1"),
        ("--sigma 99", "--sigma"),
        ("--steps 0", "--steps"),
        ("--steps 99999999", "--steps"),
        ("--steps 1", "--skip-steps"),
        ("--trace none.csv", "none.csv"),
        ("--constants none.json", "none.json"),
        ("--imbalance 1.5 --strategy paper", "cannot be used with"),
    ] {
        let line = format!("simulate --cluster cluster.json --model model.json {options}");
        let error = run(folder.path(), &line).unwrap_err();
        assert!(error.contains(expected) && !error.contains("panicked"), "{options}: {error}");
    }
    let line =
        format!("simulate --cluster {EXAMPLES}/a100-4x8.json --model {EXAMPLES}/mixtral-8x7b-e8k2-megatron.json");
    let error = run(folder.path(), &format!("{line} --strategy min-max")).unwrap_err();
    assert!(error.contains("megatron.json: line ") && error.contains("`weights`"), "{error}");
}

#[test]
fn columns_of_a_slow_machine_stay_apart() {
    let folder = folder();
    let constants = MeasuredConstants {
        seconds_per_assignment: 1e-3,
        bytes_per_token: 256.0,
        intra_node_bytes_per_second: 1e6,
        inter_node_bytes_per_second: 1e6,
        hidden_size: 64,
        intermediate_size: 96,
    };
    std::fs::write(folder.path().join("slow.json"), serde_json::to_string(&constants).unwrap()).unwrap();
    let line = "simulate --cluster cluster.json --model model.json --imbalance 1 --constants slow.json";
    let table = run(folder.path(), line).unwrap();
    let columns = |row: &str| table.lines().find(|line| line.starts_with(row)).unwrap().split_whitespace().count();
    // The last title is of two words.
    assert_eq!(columns("balanced"), columns("strategy") - 1, "{table}");
    assert!(step(&table, "balanced") > 1e6, "{table}");
}

#[test]
fn measured_constants_replace_those_of_the_cluster() {
    let folder = folder();
    let calibrate = "calibrate --output c.json --hidden-size 64 --intermediate-size 96 --ranks 1";
    run(folder.path(), &format!("{calibrate} --inter-node-bytes-per-second 1e9")).unwrap();
    let json = std::fs::read_to_string(folder.path().join("c.json")).unwrap();
    serde_json::from_str::<MeasuredConstants>(&json).unwrap().check().unwrap();
    serde_json::from_str::<CostConstants>(&json).unwrap().check().unwrap();
    let line = "simulate --cluster cluster.json --model model.json --imbalance 1";
    let (slow, fast) =
        (run(folder.path(), &format!("{line} --constants c.json")).unwrap(), run(folder.path(), line).unwrap());
    assert!(step(&slow, "balanced") > 10.0 * step(&fast, "balanced"), "{slow}");
    let error = run(folder.path(), &format!("{calibrate} --inter-node-bytes-per-second 0")).unwrap_err();
    assert!(error.contains("--inter-node-bytes-per-second"), "{error}");
}
