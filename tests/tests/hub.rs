//! Model folders of transformers: what is read of each family, on any number of ranks, is what the files have.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Duration,
};

use burn::tensor::{Tensor, TensorData};
use burn_fsep::{
    ExpertParallelism, FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::local::LaunchConfig,
    hub::{Family, HubFolder, LoadConfig, ModelConfig, SaveConfig},
};
use burn_fsep_tests::{
    FileTensor, GOLDEN, HubModel, assert_close, device, golden, launch, named_parameters, plain_device,
    read_model_tensors, read_safetensors,
};

/// What every rank of a group makes of its runtime.
fn on_ranks<T: Send>(ranks: usize, program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync) -> Vec<T> {
    let launched = LaunchConfig::new(ranks).with_timeout(Duration::from_secs(20));
    let results = launch(&launched, |comm| program(&FsepRuntimeConfig::new().with_seed(3).init(comm)?));
    results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
}

fn load(name: &str, runtime: &FsepRuntime, parallelism: ExpertParallelism) -> Result<HubModel, FsepError> {
    let folder = HubFolder::open(golden(name))?;
    let moe = folder.config().moe_config().with_expert_parallelism(parallelism);
    let model = HubModel::new(folder.config(), &moe, runtime, &device())?;
    Ok(folder.load(model, &LoadConfig::new().with_runtime(runtime))?)
}

/// Tensors of a folder as they are without quantisation.
fn plain_tensors(name: &str) -> BTreeMap<String, FileTensor> {
    let mut tensors = read_model_tensors(&golden(name));
    for (golden, tensor) in read_safetensors(&golden(name).join("golden.safetensors")) {
        let Some(plain) = golden.strip_prefix("dequantised.") else { continue };
        for of in ["", "_blocks", "_scales", "_scale_inv"] {
            tensors.remove(&format!("{plain}{of}"));
        }
        tensors.insert(plain.into(), tensor);
    }
    tensors
}

fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// What the model's parameter of this path has to be, written down once more, element by element.
fn expected(config: &ModelConfig, tensors: &BTreeMap<String, FileTensor>, path: &str, is_matrix: bool) -> Vec<f32> {
    let is_fused = tensors.keys().any(|name| name.ends_with("experts.gate_up_proj"));
    let mut name = path.replace(".gamma", ".weight").replace("shared_expert.gate.", "shared_expert_gate.");
    if !matches!(config.family, Family::GptOss) {
        name = name.replace(".router.expert_bias", ".gate.e_score_correction_bias").replace(".router.", ".gate.");
    }
    if matches!(config.family, Family::DeepseekV2 | Family::DeepseekV3) {
        name = name.replace(".shared_expert.", ".shared_experts.");
    }
    if config.family == Family::Mixtral && !is_fused {
        name = name.replace(".mlp.", ".block_sparse_moe.");
    }
    let (experts, ffn, hidden) = (config.moe.num_experts, config.moe.intermediate_size, config.hidden_size);
    let Some(block) = name.strip_suffix(".experts.weight") else {
        let values = tensors[&name].values();
        return if is_matrix && !name.contains("embed_tokens") {
            transposed(&values, tensors[&name].shape[0])
        } else {
            values
        };
    };
    let values = |name: &str| tensors[&format!("{block}.experts.{name}")].values();
    let mut row = Vec::new();
    for expert in 0..experts {
        if config.family == Family::GptOss {
            let (gate_up, down) = (values("gate_up_proj"), values("down_proj"));
            let (biases, down_bias) = (values("gate_up_proj_bias"), values("down_proj_bias"));
            for part in 0..2 {
                for f in 0..ffn {
                    row.extend((0..hidden).map(|d| gate_up[(expert * hidden + d) * 2 * ffn + 2 * f + part]));
                }
            }
            for d in 0..hidden {
                row.extend((0..ffn).map(|f| down[(expert * ffn + f) * hidden + d]));
            }
            for part in 0..2 {
                row.extend((0..ffn).map(|f| biases[expert * 2 * ffn + 2 * f + part]));
            }
            row.extend_from_slice(&down_bias[expert * hidden..(expert + 1) * hidden]);
        } else if is_fused {
            let (gate_up, down) = (values("gate_up_proj"), values("down_proj"));
            row.extend_from_slice(&gate_up[expert * 2 * ffn * hidden..(expert + 1) * 2 * ffn * hidden]);
            row.extend_from_slice(&down[expert * ffn * hidden..(expert + 1) * ffn * hidden]);
        } else {
            let names = match config.family {
                Family::Mixtral => ["w1", "w3", "w2"],
                _ => ["gate_proj", "up_proj", "down_proj"],
            };
            names.iter().for_each(|name| row.extend(values(&format!("{expert}.{name}.weight"))));
        }
    }
    row
}

/// All experts `[E * P]` of the ranks' parts.
fn whole_experts(parts: &[TensorData], experts: usize, parallelism: ExpertParallelism) -> Vec<f32> {
    let parts: Vec<Vec<f32>> = parts.iter().map(|part| part.iter().collect()).collect();
    if parallelism == ExpertParallelism::Static {
        return parts.concat();
    }
    let shard = parts[0].len() / experts;
    let row = |expert| parts.iter().flat_map(move |part| &part[expert * shard..(expert + 1) * shard]);
    (0..experts).flat_map(row).copied().collect()
}

#[test]
fn every_rank_reads_its_part_of_every_family() {
    for name in GOLDEN {
        let folder = HubFolder::open(golden(name)).unwrap();
        let (config, tensors) = (folder.config(), plain_tensors(name));
        let experts = config.moe.num_experts;
        for (ranks, parallelism) in [
            (1, ExpertParallelism::Fsep),
            (2, ExpertParallelism::Fsep),
            (4, ExpertParallelism::Fsep),
            (2, ExpertParallelism::Static),
        ] {
            if parallelism == ExpertParallelism::Static && !experts.is_multiple_of(ranks) {
                continue;
            }
            let all = on_ranks(ranks, |runtime| Ok(named_parameters(&load(name, runtime, parallelism)?)));
            for (place, (path, value)) in all[0].iter().enumerate() {
                let what = format!("{name} on {ranks} ranks: {path}");
                let expected = expected(config, &tensors, path, value.shape().len() == 2);
                if path.ends_with("experts.weight") {
                    let parts: Vec<_> = all.iter().map(|params| params[place].1.clone()).collect();
                    let found = whole_experts(&parts, experts, parallelism);
                    // What pads the shards is zeros.
                    let (params, padded) = (expected.len() / experts, found.len() / experts);
                    for (found, expected) in found.chunks(padded).zip(expected.chunks(params)) {
                        assert_eq!(found[..params], *expected, "{what}");
                        assert!(found[params..].iter().all(|&value| value == 0.0), "{what}");
                    }
                } else {
                    for params in &all {
                        assert_eq!(params[place].1.iter::<f32>().collect::<Vec<_>>(), expected, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn blocks_compute_what_those_of_transformers_do() {
    for name in &GOLDEN[..7] {
        let tensors = read_safetensors(&golden(name).join("golden.safetensors"));
        let facts: serde_json::Value =
            serde_json::from_slice(&std::fs::read(golden(name).join("golden.json")).unwrap()).unwrap();
        let prefix = facts["block.prefix"].as_str().unwrap().replace("block_sparse_moe", "mlp");
        let prefix = format!("{}.", prefix.trim_end_matches('.'));
        for ranks in [1, 2] {
            let outputs = on_ranks(ranks, |runtime| {
                let folder = HubFolder::open(golden(name))?;
                let block = folder.config().moe_config().try_init(runtime, &plain_device())?;
                let config = LoadConfig::new().with_runtime(runtime).with_prefix(&prefix).with_ignored(["*"]);
                let block = folder.load(block, &config)?;
                let input = Tensor::<2>::from_data(tensors["block.input"].data(), &plain_device());
                runtime.run(|| block.forward(input).into_data())
            });
            for output in outputs {
                assert_close(name, &output, &tensors["block.output"].data(), 1e-5);
            }
        }
    }
}

/// A model of a golden folder, loaded and saved again by some ranks.
fn round_trip(name: &str, ranks: usize, config: &SaveConfig, to: &Path) {
    on_ranks(ranks, |runtime| {
        let model = load(name, runtime, ExpertParallelism::Fsep)?;
        HubFolder::open(golden(name))?.save(runtime, &model, to, config)?;
        Ok(())
    });
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).unwrap()
}

/// Files of a folder that is there whole, and nothing beside it.
fn files_of(folder: &Path) -> Vec<String> {
    let names = |folder: &Path| -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    };
    assert_eq!(names(folder.parent().unwrap()), [folder.file_name().unwrap().to_string_lossy()], "left beside it");
    names(folder)
}

#[test]
fn what_was_read_is_written_bit_for_bit() {
    for name in GOLDEN {
        let is_quantised = name.ends_with("mxfp4") || name.ends_with("fp8");
        let source = read_model_tensors(&golden(name));
        for ranks in [1, 2, 4] {
            let temp = tempfile::tempdir().unwrap();
            let to = temp.path().join("saved");
            round_trip(name, ranks, &SaveConfig::new(), &to);
            if is_quantised {
                let saved = read_model_tensors(&to);
                assert!(saved.values().all(|tensor| tensor.dtype == "BF16" || tensor.dtype == "F32"), "{name}");
                let plain = plain_tensors(name);
                assert_eq!(saved.keys().collect::<Vec<_>>(), plain.keys().collect::<Vec<_>>(), "{name}");
                for (tensor, saved) in saved {
                    assert_eq!(saved.shape, plain[&tensor].shape, "{name}: {tensor}");
                    let rounded = |tensor: &FileTensor| -> Vec<half::bf16> {
                        tensor.values().into_iter().map(half::bf16::from_f32).collect()
                    };
                    assert_eq!(rounded(&saved), rounded(&plain[&tensor]), "{name}: {tensor}");
                }
                let mut config = json(&golden(name).join("config.json"));
                config.as_object_mut().unwrap().remove("quantization_config").unwrap();
                assert_eq!(json(&to.join("config.json")), config);
            } else {
                assert!(read_model_tensors(&to) == source, "{name} on {ranks} ranks");
                let same = |file: &str| fs::read(to.join(file)).unwrap() == fs::read(golden(name).join(file)).unwrap();
                assert!(same("config.json"), "{name}");
                // What transformers wrote to one file is that file.
                assert!(name == "mixtral_sharded" || same("model.safetensors"), "{name} on {ranks} ranks");
            }
            assert_eq!(files_of(&to), ["config.json", "model.safetensors"], "{name}");

            let temp = tempfile::tempdir().unwrap();
            let to = temp.path().join("sharded");
            round_trip(name, ranks, &SaveConfig::new().with_max_shard_size(10_000), &to);
            let index = json(&to.join("model.safetensors.index.json"));
            let map = index["weight_map"].as_object().unwrap();
            let saved = read_model_tensors(&to);
            assert!(map.keys().eq(saved.keys()), "{name}");
            let bytes: usize = saved.values().map(|tensor| tensor.bytes.len()).sum();
            assert_eq!(index["metadata"]["total_size"], bytes, "{name}");
            let files: BTreeSet<_> = map.values().map(|file| file.as_str().unwrap()).collect();
            assert!(files.len() > 3, "{name}");
            for file in files {
                let tensors = read_safetensors(&to.join(file));
                let bytes: usize = tensors.values().map(|tensor| tensor.bytes.len()).sum();
                assert!(bytes <= 10_000 || tensors.len() == 1, "{name}: {file}");
                assert!(tensors.keys().all(|tensor| map[tensor] == file), "{name}: {file}");
            }
            assert!(is_quantised || saved == source, "{name} on {ranks} ranks, sharded");
            HubFolder::open(&to).unwrap();
        }
    }
}
