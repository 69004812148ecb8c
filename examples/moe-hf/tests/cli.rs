//! The commands, as threads and as processes of fsep-launch.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use burn_fsep::launch::LauncherConfig;
use burn_fsep_planner::tools::trace::Trace;
use safetensors::SafeTensors;
use serde_json::Value;

/// Not a test: what `fsep-launch` does, in a process of its own.
#[test]
#[ignore = "started by launched"]
fn launcher() {
    let command: Vec<String> = serde_json::from_str(&std::env::var("MOE_HF_COMMAND").unwrap()).unwrap();
    let ranks = std::env::var("MOE_HF_RANKS").unwrap().parse().unwrap();
    let code = LauncherConfig::new(ranks, &command[0]).with_args(&command[1..]).run().unwrap();
    std::process::exit(code.into());
}

fn moe_hf(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-hf")).args(args).output().unwrap()
}

/// The same as so many processes of fsep-launch.
fn launched(ranks: usize, args: &[&str]) -> Output {
    let words: Vec<&str> = [env!("CARGO_BIN_EXE_moe-hf")].into_iter().chain(args.iter().copied()).collect();
    Command::new(std::env::current_exe().unwrap())
        .args(["launcher", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("MOE_HF_COMMAND", serde_json::to_string(&words).unwrap())
        .env("MOE_HF_RANKS", ranks.to_string())
        .output()
        .unwrap()
}

/// What a command printed that has to work.
fn printed(output: &Output) -> String {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success(), "{stdout}{stderr}");
    stdout
}

/// What it said that cannot work.
fn refused(args: &[&str]) -> String {
    let output = moe_hf(args);
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A tiny model of bytes.
fn tiny(folder: &Path, options: &[&str]) -> PathBuf {
    let model = folder.join("tiny");
    let small = ["--hidden", "32", "--ffn", "16", "--experts", "4"];
    let args: Vec<&str> =
        ["make", "--output", text(&model)].into_iter().chain(small).chain(options.iter().copied()).collect();
    printed(&moe_hf(&args));
    model
}

/// Text that a tiny model learns something from.
fn corpus(folder: &Path) -> PathBuf {
    let file = folder.join("text.txt");
    let words = ["to be ", "or not ", "to bee ", "that is ", "the question ", "\n"];
    std::fs::write(&file, (0..3000).map(|i| words[i * i % 7 % 6]).collect::<String>()).unwrap();
    file
}

#[test]
fn logits_do_not_depend_on_how_ranks_are_started() {
    let folder = tempfile::tempdir().unwrap();
    let ids = folder.path().join("ids.json");
    std::fs::write(&ids, "[[1, 2, 3, 4, 5], [7, 8], [9, 10, 11]]").unwrap();
    let model = golden("olmoe");
    let args = |output: &'static str| -> Vec<String> {
        let output = folder.path().join(output);
        let args = ["logits", "--model", text(&model), "--ids", text(&ids), "--output", text(&output)];
        args.map(String::from).to_vec()
    };
    let run = |output: &'static str, ranks: &[&str]| {
        let args = args(output);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(ranks.iter().copied()).collect();
        printed(&moe_hf(&args));
        json(&folder.path().join(output))
    };
    let one = run("one.json", &[]);
    let rows: Vec<usize> = one["logits"].as_array().unwrap().iter().map(|row| row.as_array().unwrap().len()).collect();
    assert_eq!((rows, one["logits"][0][0].as_array().unwrap().len()), (vec![5, 2, 3], 96));
    let four = run("four.json", &["--ranks", "4"]);
    let arguments = args("processes.json");
    printed(&launched(3, &arguments.iter().map(String::as_str).collect::<Vec<_>>()));
    let processes = json(&folder.path().join("processes.json"));
    let flat = |value: &Value| -> Vec<f64> {
        let rows = value["logits"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
        rows.flat_map(|token| token.as_array().unwrap()).map(|value| value.as_f64().unwrap()).collect()
    };
    let one = flat(&one);
    for other in [flat(&four), flat(&processes)] {
        assert_eq!(other.len(), one.len());
        assert!(one.iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-5), "logits differ");
    }
}

/// `--steps 0`: read by some ranks and written by others, every tensor has its bits and config.json its keys.
#[test]
fn a_round_trip_keeps_every_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (family, ranks) in [("mixtral", "1"), ("qwen2_moe", "2"), ("qwen3_moe", "3"), ("olmoe", "4")] {
        let output = folder.path().join(family);
        let model = golden(family);
        // The golden vocabularies are smaller than a byte's values: without a step no text is needed.
        let args = ["finetune", "--model", text(&model), "--steps", "0", "--ranks", ranks, "--output", text(&output)];
        printed(&moe_hf(&args));
        assert_eq!(json(&output.join("config.json")), json(&model.join("config.json")), "{family}");
        let [ours, theirs] = [&output, &model].map(|folder| std::fs::read(folder.join("model.safetensors")).unwrap());
        let [ours, theirs] = [&ours, &theirs].map(|file| SafeTensors::deserialize(file).unwrap());
        let [mut names, mut expected] = [ours.names(), theirs.names()];
        names.sort_unstable();
        expected.sort_unstable();
        assert_eq!(names, expected, "{family}");
        for name in names {
            let [ours, theirs] = [&ours, &theirs].map(|file| file.tensor(name).unwrap());
            assert_eq!((ours.dtype(), ours.shape()), (theirs.dtype(), theirs.shape()), "{family} {name}");
            assert!(ours.data() == theirs.data(), "{family} {name}: other values");
        }
    }
}

#[test]
fn a_tiny_model_learns_and_its_folder_speaks() {
    let folder = tempfile::tempdir().unwrap();
    let (model, corpus) = (tiny(folder.path(), &[]), corpus(folder.path()));
    let [output, summary, trace] = ["tuned", "summary.json", "trace.csv"].map(|name| folder.path().join(name));
    let args = |output: &Path, summary: &Path| -> Vec<String> {
        let model_and_text = ["finetune", "--model", text(&model), "--text", text(&corpus), "--sample", "8"];
        let sizes = ["--steps", "25", "--seq-len", "16", "--batch", "4", "--lr", "5e-3"];
        let files = ["--output", text(output), "--summary", text(summary)];
        model_and_text.iter().chain(&sizes).chain(&files).map(ToString::to_string).collect()
    };
    let first = args(&output, &summary);
    let options = ["--ranks", "2", "--synchronous", "--record-trace", text(&trace)];
    let report = printed(&moe_hf(&first.iter().map(String::as_str).chain(options).collect::<Vec<_>>()));
    assert!(report.contains("expert imbalance, as planned") && report.contains("sample, after"), "{report}");
    let numbers = json(&summary);
    let losses: Vec<f64> = numbers["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
    assert_eq!((losses.len(), &numbers["ranks"], &numbers["steps"]), (25, &2.into(), &25.into()));
    assert!((losses[0] - 256f64.ln()).abs() < 0.1 && losses[24] < losses[0] - 1.5, "{losses:?}");
    let [before, after] = ["valid_loss_before", "valid_loss_after"].map(|name| numbers[name].as_f64().unwrap());
    assert!(after < before - 1.5, "{before} -> {after}");
    let trace = Trace::from_csv(&std::fs::read_to_string(trace).unwrap()).unwrap();
    assert_eq!((trace.num_ranks(), trace.num_experts(), trace.layers()), (2, 4, vec![0, 1]));
    // 4 sequences of 16 bytes, two experts for each byte.
    assert!(trace.steps(1).all(|(_, counts)| counts.total() == 4 * 16 * 2));

    // As processes it is the same training.
    let [other, other_summary] = ["other", "other.json"].map(|name| folder.path().join(name));
    let again = args(&other, &other_summary);
    printed(&launched(3, &again.iter().map(String::as_str).collect::<Vec<_>>()));
    for (a, b) in losses.iter().zip(json(&other_summary)["losses"].as_array().unwrap()) {
        assert!((a - b.as_f64().unwrap()).abs() < 1e-4 * a, "{a} is not {b}");
    }

    let speak = |ranks| {
        printed(&moe_hf(&["generate", "--model", text(&output), "--prompt", "to ", "--tokens", "12", "--ranks", ranks]))
    };
    assert!(speak("1").starts_with("to "));
    assert_eq!(speak("1"), speak("2"));
    let greedy = printed(&moe_hf(&[
        "generate",
        "--model",
        text(&output),
        "--prompt",
        "to ",
        "--tokens",
        "3",
        "--temperature",
        "0",
    ]));
    assert_eq!(greedy.len(), "to ".len() + 3 + 1, "{greedy:?}");
}

/// What `finetune` saves where no folder is given can be fine-tuned further in the same place.
#[test]
fn the_default_folder_is_there_whatever_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let (model, corpus) = (tiny(folder.path(), &[]), corpus(folder.path()));
    let tuned = folder.path().join("target/moe-hf/finetuned");
    for model in [&model, &tuned] {
        let args = ["finetune", "--model", text(model), "--text", text(&corpus), "--sample", "0", "--ranks", "2"];
        let sizes = ["--steps", "1", "--seq-len", "16", "--batch", "4"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-hf"));
        printed(&command.args(args).args(sizes).current_dir(folder.path()).output().unwrap());
        printed(&moe_hf(&["inspect", "--model", text(&tuned)]));
        assert!(!tuned.with_extension("new").exists());
    }
}

#[test]
fn frozen_routers_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (model, corpus) = (tiny(folder.path(), &["--family", "mixtral"]), corpus(folder.path()));
    let output = folder.path().join("tuned");
    let args =
        ["finetune", "--model", text(&model), "--text", text(&corpus), "--output", text(&output), "--sample", "0"];
    let options = ["--steps", "2", "--seq-len", "16", "--batch", "4", "--freeze-router", "--ranks", "2"];
    printed(&moe_hf(&args.into_iter().chain(options).collect::<Vec<_>>()));
    let [ours, theirs] = [&output, &model].map(|folder| std::fs::read(folder.join("model.safetensors")).unwrap());
    let [ours, theirs] = [&ours, &theirs].map(|file| SafeTensors::deserialize(file).unwrap());
    for name in theirs.names() {
        let is_same = ours.tensor(name).unwrap().data() == theirs.tensor(name).unwrap().data();
        assert_eq!(is_same, name.ends_with("block_sparse_moe.gate.weight"), "{name}");
    }
}

/// The numbers that the model's file has.
#[test]
fn inspect_counts_every_parameter() {
    for (family, active_experts) in [("mixtral", 2), ("qwen2_moe", 3), ("qwen3_moe", 4), ("olmoe", 2)] {
        let report = printed(&moe_hf(&["inspect", "--model", text(&golden(family)), "--ranks", "1,4"]));
        let file = std::fs::read(golden(family).join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let counts: Vec<(String, usize)> =
            tensors.tensors().into_iter().map(|(name, view)| (name, view.shape().iter().product())).collect();
        let total: usize = counts.iter().map(|(_, count)| count).sum();
        let experts: usize = counts.iter().filter(|(name, _)| name.contains(".experts.")).map(|(_, count)| count).sum();
        let active = total - experts / 8 * (8 - active_experts);
        for (name, count) in [("parameters  ", total), ("parameters a token", active)] {
            let line = report.lines().find(|line| line.starts_with(name)).unwrap();
            assert_eq!(line.split_whitespace().find_map(|word| word.parse().ok()), Some(count), "{family}: {line}");
        }
        assert!(report.contains(family), "{report}");
    }
}

/// bfloat16 in the computation alone, and in all: rounding, not another training. The folder keeps its own types.
#[test]
fn half_precision_stays_near_single_precision() {
    let folder = tempfile::tempdir().unwrap();
    let (model, corpus) = (tiny(folder.path(), &[]), corpus(folder.path()));
    let losses = |dtype: &str| -> Vec<f64> {
        let [output, summary] = [dtype, "summary.json"].map(|name| folder.path().join(name));
        let files = ["--model", text(&model), "--text", text(&corpus), "--output", text(&output)];
        let rest = ["--summary", text(&summary), "--sample", "4", "--dtype", dtype, "--ranks", "2"];
        let sizes = ["--steps", "8", "--seq-len", "16", "--batch", "4"];
        printed(&moe_hf(&["finetune"].into_iter().chain(files).chain(rest).chain(sizes).collect::<Vec<_>>()));
        let file = std::fs::read(output.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(tensors.tensor("lm_head.weight").unwrap().dtype(), safetensors::Dtype::F32);
        json(&summary)["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect()
    };
    let single = losses("f32");
    for dtype in ["mixed", "bf16"] {
        for (half, single) in losses(dtype).iter().zip(&single) {
            assert!((half - single).abs() < 0.02 * single, "{dtype}: {half} is not {single}");
        }
    }
}

/// Of config.json alone: OLMoE-1B-7B has 6.9 billion parameters, 1.3 of them for each token. A tiny model takes its steps.
#[test]
fn a_configuration_is_enough_to_inspect_and_to_measure() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/olmoe-1b-7b");
    let report = printed(&moe_hf(&["inspect", "--model", text(&configs), "--ranks", "8"]));
    assert!(report.contains("(6.919 billion)") && report.contains("(1.282 billion)"), "{report}");

    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path(), &["--family", "olmoe"]);
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    let sizes = [
        "--layers",
        "1",
        "--batch",
        "2",
        "--seq-len",
        "16",
        "--warmup",
        "1",
        "--steps",
        "2",
        "--ranks",
        "2",
        "--sharded-optimizer",
    ];
    let args: Vec<&str> = ["bench", "--config-only", text(&model)].into_iter().chain(sizes).collect();
    let line: Value = serde_json::from_str(&printed(&moe_hf(&args))).unwrap();
    assert_eq!((&line["ranks"], &line["layers"], &line["steps"]), (&2.into(), &1.into(), &2.into()));
    for number in ["tokens_per_s", "step_ms", "peak_gib", "estimated_peak_gib", "optimizer_state_gib", "first_loss"] {
        assert!(line[number].as_f64().unwrap() > 0.0, "{number}: {line}");
    }
}

/// A job that cannot fit is refused before it starts, with options that would.
#[test]
fn what_does_not_fit_is_said_before_it_starts() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/olmoe-1b-7b");
    let inspect = |gib| {
        let job = ["--ranks", "8", "--expert-parallel-size", "4", "--dtype", "bf16", "--memory-gib", gib];
        moe_hf(&["inspect", "--model", text(&configs)].into_iter().chain(job).collect::<Vec<_>>())
    };
    assert!(printed(&inspect("1000")).contains("yes"));
    let output = inspect("1");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("does not fit") && error.contains("1.00 GiB"), "{error}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("peak"));
    // More tokens than any machine holds.
    let sizes = ["--batch", "1000000", "--seq-len", "1024", "--ranks", "2"];
    let args: Vec<&str> = ["bench", "--config-only", text(&configs)].into_iter().chain(sizes).collect();
    let error = refused(&args);
    assert!(error.contains("does not fit") || !cfg!(target_os = "linux"), "{error}");
}

#[test]
fn what_cannot_work_is_said_before_anything_is_computed() {
    let folder = tempfile::tempdir().unwrap();
    let [ids, output] = ["ids.json", "out.json"].map(|name| folder.path().join(name));
    let (model, there) = (golden("olmoe"), folder.path());
    let logits = |content: &str| {
        std::fs::write(&ids, content).unwrap();
        refused(&["logits", "--model", text(&model), "--ids", text(&ids), "--output", text(&output)])
    };
    assert!(logits("[[1, 96]]").contains("token 96"), "{}", logits("[[1, 96]]"));
    assert!(logits("[[1], []]").contains("row 1"), "{}", logits("[[1], []]"));
    assert!(logits("[1]").contains("[[token, ...], ...]"), "{}", logits("[1]"));
    for (args, named) in [
        (vec!["finetune", "--output", text(there)], "is there already"),
        (vec!["finetune", "--lr", "0"], "--lr"),
        (vec!["finetune", "--seq-len", "1"], "--seq-len"),
        (vec!["finetune", "--seq-len", "18446744073709551615"], "--seq-len"),
        (vec!["finetune", "--batch", "18446744073709551615"], "--batch"),
        (vec!["finetune", "--model", text(&model), "--steps", "1"], "tokenizer.json"),
        (vec!["finetune", "--device", "cuda"], "--backend libtorch"),
        (vec!["finetune", "--steps", "0", "--record-trace", "x.csv"], "--record-trace"),
        #[cfg(target_os = "linux")]
        (vec!["finetune", "--model", text(&model), "--steps", "0", "--output", "/proc/no/folder"], "/proc/no"),
        #[cfg(target_os = "linux")]
        (vec!["finetune", "--summary", "/proc/no.json"], "/proc/no.json"),
        (vec!["generate", "--model", "no/such/folder", "--prompt", "a"], "no/such/folder"),
        (vec!["generate", "--model", text(&golden("deepseek_v3")), "--prompt", "a"], "deepseek_v3"),
        (vec!["inspect", "--model", text(&golden("gpt_oss"))], "attention sinks"),
        (vec!["make", "--output", text(&output), "--hidden", "12"], "--hidden"),
        (vec!["make", "--output", text(&output), "--top-k", "9"], "--top-k"),
        (vec!["make", "--output", text(there)], "is there already"),
    ] {
        let error = refused(&args);
        assert!(error.contains(named), "{args:?}: {error}");
    }
}
