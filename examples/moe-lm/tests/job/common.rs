use std::{path::Path, process::Command};

/// Runs moe-lm on a small text and returns its summary.
pub fn summary(folder: &Path, options: &[&str]) -> serde_json::Value {
    let file = folder.join("summary.json");
    let output = small_job(folder, options).arg("--summary").arg(&file).output().unwrap();
    assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// moe-lm with few steps of a small model on a small text, and these options or values of options.
pub fn small_job(folder: &Path, options: &[&str]) -> Command {
    let text = folder.join("text.txt");
    let words = ["to be ", "or not ", "to bee ", "that is ", "the question ", "\n"];
    std::fs::write(&text, (0..4000).map(|i| words[i * i % 7 % 6]).collect::<String>()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-lm"));
    for (name, value) in [
        ("--text", text.to_str().unwrap()),
        ("--out", folder.join("out").to_str().unwrap()),
        ("--batch", "4"),
        ("--context", "16"),
        ("--layers", "2"),
        ("--hidden", "16"),
        ("--heads", "2"),
        ("--ffn", "12"),
        ("--experts", "4"),
        ("--steps", "12"),
        ("--valid-batches", "2"),
        ("--sample", "8"),
    ] {
        if !options.contains(&name) {
            command.args([name, value]);
        }
    }
    command.args(options);
    command
}

/// Numbers of a summary that do not depend on time.
pub fn losses(summary: &serde_json::Value) -> [f64; 2] {
    ["train_loss", "valid_loss"].map(|loss| summary[loss].as_f64().unwrap())
}

/// The losses of all steps of the last job in this folder.
pub fn curve(folder: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap();
    let row = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap();
    text.lines().map(row).collect()
}
