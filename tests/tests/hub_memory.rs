//! What ranks that are processes hold while they load and save a model: their part of it and some MB. Linux tells.
#![cfg(all(target_os = "linux", not(any(feature = "libtorch", feature = "mpi", feature = "nccl"))))]

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use burn_fsep::{
    FsepRuntime,
    hub::{HubError, HubFolder, LoadConfig, SaveConfig},
};
use burn_fsep_tests::{HubModel, Launcher, RankProcesses, plain_device, rank_of_process};
use serde_json::{Value, json};

const FOLDER: &str = "FSEP_TEST_MODEL";
const MB: usize = 1 << 20;

/// A Mixtral in single precision, one file a layer.
fn make_model(folder: &Path, layers: usize, experts: usize, hidden: usize, ffn: usize) -> usize {
    let config = json!({
        "model_type": "mixtral", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": hidden / 64, "num_key_value_heads": 1, "num_local_experts": experts,
        "num_experts_per_tok": 2, "vocab_size": 512, "max_position_embeddings": 512, "dtype": "float32",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let (mut map, mut total) = (serde_json::Map::new(), 0);
    for layer in 0..=layers {
        let prefix = format!("model.layers.{layer}.");
        let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
        if layer == layers {
            let outer = [
                ("model.embed_tokens", vec![512, hidden]),
                ("model.norm", vec![hidden]),
                ("lm_head", vec![512, hidden]),
            ];
            shapes.extend(outer.map(|(name, shape)| (format!("{name}.weight"), shape)));
        } else {
            let square = vec![hidden, hidden];
            for (name, shape) in [
                ("self_attn.q_proj", square.clone()),
                ("self_attn.k_proj", vec![64, hidden]),
                ("self_attn.v_proj", vec![64, hidden]),
                ("self_attn.o_proj", square),
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("block_sparse_moe.gate", vec![experts, hidden]),
            ] {
                shapes.push((format!("{prefix}{name}.weight"), shape));
            }
            for expert in 0..experts {
                for (name, shape) in [("w1", [ffn, hidden]), ("w2", [hidden, ffn]), ("w3", [ffn, hidden])] {
                    shapes.push((format!("{prefix}block_sparse_moe.experts.{expert}.{name}.weight"), shape.to_vec()));
                }
            }
        }
        let file = format!("model-{:05}-of-{:05}.safetensors", layer + 1, layers + 1);
        let (mut table, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in shapes {
            let bytes = 4 * shape.iter().product::<usize>();
            table.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [end, end + bytes]}));
            map.insert(name, json!(file));
            end += bytes;
        }
        let table = Value::Object(table).to_string();
        let mut opened = File::create(folder.join(file)).unwrap();
        opened.write_all(&(table.len() as u64).to_le_bytes()).unwrap();
        opened.write_all(table.as_bytes()).unwrap();
        // 0.02 or so, over and over: on disk, not a hole.
        let chunk: Vec<u8> = (0..MB / 4).flat_map(|i| (0.02 * (i as f32).sin()).to_le_bytes()).collect();
        for start in (0..end).step_by(MB) {
            opened.write_all(&chunk[..MB.min(end - start)]).unwrap();
        }
        total += end;
    }
    fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    total
}

/// A line of /proc/self/status, in bytes.
fn status(key: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

fn reset_peak() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

#[test]
#[ignore = "a rank of the tests here"]
fn rank_that_loads_and_saves() {
    let path = PathBuf::from(std::env::var_os(FOLDER).expect("started by a test here"));
    rank_of_process(|comm, job| {
        let rank = comm.rank();
        let runtime = FsepRuntime::new(comm)?;
        let folder = HubFolder::open(&path)?;
        let before = status("VmRSS");
        let model = HubModel::new(folder.config(), &folder.config().moe_config(), &runtime, &plain_device())?;
        reset_peak();
        let model = folder.load(model, &LoadConfig::new().with_runtime(&runtime))?;
        let loading = status("VmHWM").saturating_sub(before);
        eprintln!("{} MB before there is a model", before / MB);
        reset_peak();
        folder.save(&runtime, &model, job.join("saved"), &SaveConfig::new().with_max_shard_size(64 * MB as u64))?;
        let saving = status("VmHWM").saturating_sub(before);
        let peaks = json!({ "loading": loading, "saving": saving });
        let failed = |error: std::io::Error| HubError::Option(error.to_string());
        fs::write(job.join(format!("peaks-{rank}.json")), peaks.to_string()).map_err(failed)?;
        Ok(())
    });
}

/// Loads and saves a model by ranks, none of which may have more than `allowed` bytes beside its part.
fn check_memory(ranks: usize, [layers, experts, hidden, ffn]: [usize; 4], allowed: [usize; 2]) {
    let temp = tempfile::tempdir().unwrap();
    let total = make_model(temp.path(), layers, experts, hidden, ffn);
    let of_experts = layers * experts * 3 * hidden * ffn * 4;
    let part = of_experts / ranks + total - of_experts;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["rank_that_loads_and_saves", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(FOLDER, temp.path());
    let mut job = RankProcesses::start(Launcher::Direct, ranks, &command);
    job.wait_until_passed(Duration::from_secs(600));
    let peaks = |rank| -> Value {
        serde_json::from_slice(&fs::read(job.folder().join(format!("peaks-{rank}.json"))).unwrap()).unwrap()
    };
    for rank in 0..ranks {
        for (what, allowed) in ["loading", "saving"].into_iter().zip(allowed) {
            let peak = peaks(rank)[what].as_u64().unwrap() as usize;
            eprintln!("rank {rank} {what}: {} MB, its part of {} MB has {}", peak / MB, total / MB, part / MB);
            assert!(peak <= part + allowed, "rank {rank} {what}: {peak} bytes, its part has {part}");
        }
    }
    // What was written is what was read.
    let (source, saved) = (HubFolder::open(temp.path()).unwrap(), HubFolder::open(job.folder().join("saved")).unwrap());
    assert!(source.tensor_names().eq(saved.tensor_names()));
}

/// Of a model that one rank could not hold within these: what travels waits longer where a machine is busy.
#[test]
fn four_ranks_hold_their_parts() {
    check_memory(4, [4, 8, 256, 1792], [64 * MB, 96 * MB]);
}

#[test]
#[ignore = "a gigabyte, and 16 processes"]
fn sixteen_ranks_hold_their_parts_of_a_gigabyte() {
    check_memory(16, [5, 16, 512, 2048], [64 * MB, 96 * MB]);
}
