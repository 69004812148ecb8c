//! The command line: formats, and errors that name the file and what is expected.
#![cfg(feature = "cli")]

use std::{path::Path, process::Command};

use serde_json::{Value, json};

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

fn plan(input: &str) -> Result<Value, String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("in.json"), input).unwrap();
    let result = run(folder.path(), "plan --input in.json --output out.json");
    let output = std::fs::read(folder.path().join("out.json"));
    match result {
        Ok(_) => Ok(serde_json::from_slice(&output.unwrap()).unwrap()),
        Err(error) => {
            assert!(output.is_err(), "nothing is written when a command fails");
            Err(error)
        }
    }
}

#[test]
fn a_plan_dispatches_every_token_to_a_holder() {
    let counts = json!([[90, 10, 5, 7], [80, 0, 9, 3], [70, 20, 1, 1], [60, 30, 0, 2]]);
    for history in [json!([]), json!([counts, counts])] {
        let input = json!({"ranks_per_node": 2, "slots_per_rank": 2, "counts": counts, "history": history});
        let plan = plan(&input.to_string()).unwrap();
        let mut dispatched = vec![vec![0; 4]; 4];
        let mut loads = vec![0; 4];
        for share in plan["dispatch"].as_array().unwrap() {
            let [s, e, r, tokens] = [0, 1, 2, 3].map(|i| share[i].as_u64().unwrap() as usize);
            assert!(plan["layout"][r].as_array().unwrap().contains(&json!(e)), "rank {r} holds expert {e}");
            dispatched[s][e] += tokens;
            loads[r] += tokens;
        }
        assert_eq!(json!(dispatched), counts);
        assert_eq!(json!(loads), plan["loads"]);
        assert!(plan["max_over_mean"].as_f64().unwrap() < 1.02, "{plan}");
        assert!(plan["layout_us"].as_f64().unwrap() > 0.0 && plan["inter_node_tokens"].is_u64());
    }
}

#[test]
fn bad_input_is_named() {
    for (input, expected) in [
        ("{", "line 1"),
        ("{\"ranks_per_node\": 1,\n\"slots_per_rank\": 1, \"counts\": [[1.5]]}", "line 2"),
        (r#"{"ranks_per_node": 1, "slots_per_rank": 1, "counts": [[-1]]}"#, "expected"),
        (r#"{"ranks_per_node": 1, "counts": [[1]]}"#, "slots_per_rank"),
        (r#"{"ranks_per_node": 1, "slots_per_rank": 1, "counts": []}"#, "at least 1"),
        (r#"{"ranks_per_node": 0, "slots_per_rank": 1, "counts": [[1]]}"#, "ranks per node"),
        (r#"{"ranks_per_node": 1, "slots_per_rank": 1, "counts": [[1, 2]]}"#, "raise slots per rank"),
        (r#"{"ranks_per_node": 1, "slots_per_rank": 3, "counts": [[1, 2]]}"#, "lower slots per rank"),
        (r#"{"ranks_per_node": 1, "slots_per_rank": 1, "counts": [[1], [2, 3]]}"#, "rank 1"),
        (r#"{"ranks_per_node": 1, "slots_per_rank": 1, "counts": [[1]], "history": [[[1], [1]]]}"#, "expected 1"),
        (r#"{"ranks_per_node": 1, "slots_per_rank": 1, "counts": [[4294967295], [1]]}"#, "more than"),
    ] {
        let error = plan(input).unwrap_err();
        assert!(
            error.contains("in.json") && error.contains(expected) && !error.contains("panicked"),
            "{input}: {error}"
        );
    }
}

#[test]
fn replay_compares_strategies() {
    let folder = tempfile::tempdir().unwrap();
    let mut trace = "layer,step,src_rank,expert0,expert1,expert2,expert3\n".to_string();
    for step in 0..4 {
        for rank in 0..4 {
            trace.push_str(&format!("0,{step},{rank},{},20,15,5\n", 60 + rank));
        }
    }
    std::fs::write(folder.path().join("trace.csv"), &trace).unwrap();
    let options = "--trace trace.csv --slots-per-rank 2 --ranks-per-node 4";
    let table = run(folder.path(), &format!("replay {options}")).unwrap();
    let mean = |strategy: &str| -> f64 {
        let row = table.lines().find(|line| line.starts_with(strategy)).unwrap();
        row.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert!(mean("static") > 1.3 && mean("min-max") < 1.01, "{table}");
    assert!(mean("min-max") <= mean("paper"), "{table}");

    let one = run(folder.path(), &format!("replay {options} --strategy paper")).unwrap();
    assert!(one.contains("\npaper") && !one.contains("\nmin-max"), "{one}");
    for (line, expected) in [
        ("replay --trace none.csv --slots-per-rank 2 --ranks-per-node 4".to_string(), "none.csv"),
        (format!("replay {options} --skip-steps 4"), "--skip-steps"),
        (format!("replay {options} --strategy best"), "min-max"),
        ("replay --trace trace.csv --slots-per-rank 9 --ranks-per-node 4".to_string(), "lower slots per rank"),
    ] {
        let error = run(folder.path(), &line).unwrap_err();
        assert!(error.contains(expected), "{line}: {error}");
    }
    std::fs::write(folder.path().join("trace.csv"), format!("{trace}0,9,0,1,2,x,4\n")).unwrap();
    let error = run(folder.path(), &format!("replay {options}")).unwrap_err();
    assert!(error.contains("trace.csv: line 18: expert2"), "{error}");
}

#[test]
fn a_report_is_one_page_with_every_figure() {
    let folder = tempfile::tempdir().unwrap();
    let mut trace = "layer,step,src_rank,expert0,expert1,expert2\n".to_string();
    for (layer, step, rank) in (0..24).map(|i| (i / 12, i / 4 % 3, i % 4)) {
        trace += &format!("{layer},{step},{rank},{},10,5\n", 40 + 7 * step);
    }
    std::fs::write(folder.path().join("a<b>.csv"), trace).unwrap();
    let options = "--trace a<b>.csv --slots-per-rank 2 --ranks-per-node 2";
    run(folder.path(), &format!("report {options} --output page.html")).unwrap();
    let page = std::fs::read_to_string(folder.path().join("page.html")).unwrap();
    for title in
        ["Imbalance over steps", "Load per rank", "Expert load by layer", "Solve times", "min-max", "a&lt;b&gt;"]
    {
        assert!(page.contains(title), "{title}");
    }
    assert_eq!(page.matches("<svg").count(), 4);
    assert!(!page.contains("src=") && !page.contains("href="), "self-contained");
    let error = run(folder.path(), &format!("report {options} --output missing/page.html")).unwrap_err();
    assert!(error.contains("missing/page.html"), "{error}");
}

#[test]
fn replay_tells_what_tokens_need_to_other_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let mut tokens = "layer,step,src_rank,choice0,choice1,choice2,choice3\n".to_string();
    for step in 0..4 {
        for rank in 0..4 {
            for token in 0..200usize {
                // Expert 0 is every token's, so it has replicas; the others differ.
                let other = |k: usize| 1 + (token * 7 + rank * 3 + step + k * 5) % 15;
                tokens.push_str(&format!("0,{step},{rank},0,{},{},{}\n", other(0), other(1), other(2)));
            }
        }
    }
    std::fs::write(folder.path().join("tokens.csv"), &tokens).unwrap();
    let options = "--tokens tokens.csv --experts 16 --slots-per-rank 5 --ranks-per-node 4 --strategy min-max";
    let table = run(folder.path(), &format!("replay {options}")).unwrap();
    let row = table.lines().rfind(|line| line.starts_with("min-max")).unwrap();
    let cells: Vec<f64> = row.split_whitespace().skip(1).map(|cell| cell.parse().unwrap()).collect();
    let [by_assignment, by_rank, _, shared, share] = cells[..] else { panic!("{table}") };
    assert!(shared < by_rank && by_rank < by_assignment && share < 0.9, "{table}");
    for (line, expected) in [
        (format!("replay {options} --trace trace.csv"), "--trace"),
        (options.replace("--experts 16", "--experts 8").replace("--tokens", "replay --tokens"), "expected one of 0..8"),
    ] {
        let error = run(folder.path(), &line).unwrap_err();
        assert!(error.contains(expected) && !error.contains("panicked"), "{line}: {error}");
    }
}

#[test]
fn replay_makes_workloads() {
    let folder = tempfile::tempdir().unwrap();
    let options = "--ranks 8 --ranks-per-node 8 --slots-per-rank 3 --experts 16 --steps 6";
    let table = run(folder.path(), &format!("replay --workload 50:2 {options}")).unwrap();
    let mean = |name: &str| -> f64 {
        let row = table.lines().find(|line| line.starts_with(name)).unwrap();
        row[18..].split_whitespace().next().unwrap().parse().unwrap()
    };
    assert!(mean("static") > 1.4 && mean("min-max") < 1.02 && mean("no layout beats") <= mean("min-max"), "{table}");
    for strategy in ["eplb ", "eplb-hierarchical", "flex-moe", "random"] {
        assert!(mean("min-max") <= mean(strategy), "{table}");
    }
    for (line, expected) in [
        (format!("replay --workload w9 {options}"), "w6-rotating-hotspot"),
        (format!("replay --workload 60:1 {options}"), "at most 50 %"),
        (format!("replay --workload w0 {options} --topk 17"), "top-k of 17"),
        (format!("replay --workload w0 {options} --trace trace.csv"), "--trace"),
        ("replay --workload w0 --ranks 8 --ranks-per-node 8 --slots-per-rank 3".to_string(), "raise slots per rank"),
        ("replay --workload w0 --ranks-per-node 8 --slots-per-rank 3".to_string(), "--ranks"),
        ("replay --ranks-per-node 8 --slots-per-rank 3".to_string(), "--trace"),
    ] {
        let error = run(folder.path(), &line).unwrap_err();
        assert!(error.contains(expected) && !error.contains("panicked"), "{line}: {error}");
    }
}

#[test]
fn the_benchmark_balances_a_moving_hotspot() {
    let folder = tempfile::tempdir().unwrap();
    let table = run(folder.path(), "benchmark --ranks 8 --workload w6 --workload w7 --steps 7").unwrap();
    let sizes: Vec<&str> = table.lines().filter(|line| line.starts_with("N=")).collect();
    assert_eq!(sizes.len(), 2, "{table}");
    for (size, part) in sizes.iter().zip(table.split("N=").skip(1)) {
        // workload, static, planned | repaired, p95, ..
        let row = part.lines().find(|line| line.starts_with("w6-rotating-hotspot")).unwrap();
        let numbers: Vec<f64> = row.split_whitespace().filter_map(|cell| cell.parse().ok()).collect();
        let [fixed, planned, repaired, p95, ..] = numbers[..] else { panic!("{row}") };
        assert!(fixed > 1.5 && planned > 1.2, "{size}: {row}");
        assert!(repaired <= 1.02 && repaired <= p95 && p95 <= 1.05, "{size}: {row}");
        let all = part.lines().find(|line| line.starts_with("all, bound")).unwrap();
        assert!(all.contains(" 12 steps (0 cannot be balanced)"), "{all}");
    }
    let error = run(folder.path(), "benchmark --ranks 9").unwrap_err();
    assert!(error.contains("no layer for 9 ranks; choose of 8, 64, 256"), "{error}");
    let error = run(folder.path(), "benchmark --ranks 8 --steps 1").unwrap_err();
    assert!(error.contains("number of steps after the first"), "{error}");
}
