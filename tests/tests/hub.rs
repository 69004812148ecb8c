//! Model folders of transformers: what is read of each family, on any number of ranks, is what the files have.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use burn::{
    module::{Module, ModuleMapper, Param},
    nn::{Linear, LinearConfig, LinearLayout},
    tensor::{DType, FloatDType, Tensor, TensorData},
};
use burn_fsep::{
    ExpertParallelism, FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::local::LaunchConfig,
    hub::{Family, HubError, HubFolder, LayerType, LoadConfig, ModelConfig, Progress, RopeScaling, SaveConfig},
    moe::{ExpertActivation, GroupScore},
};
use burn_fsep_tests::{
    FileTensor, GOLDEN, HubModel, assert_close, device, golden, launch_runtimes, named_parameters, plain_device,
    read_model_tensors, read_safetensors, write_safetensors,
};

/// What every rank of a group makes of its runtime.
fn on_ranks<T: Send>(ranks: usize, program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync) -> Vec<T> {
    let launched = LaunchConfig::new(ranks).with_timeout(Duration::from_secs(20));
    launch_runtimes(&launched, &FsepRuntimeConfig::new().with_seed(3), program)
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

#[test]
fn both_versions_of_configurations_say_the_same() {
    for name in &GOLDEN[..7] {
        let temp = tempfile::tempdir().unwrap();
        fs::copy(golden(name).join("model.safetensors"), temp.path().join("model.safetensors")).unwrap();
        fs::copy(golden(name).join("config_v4.json"), temp.path().join("config.json")).unwrap();
        let (old, new) = (HubFolder::open(temp.path()).unwrap(), HubFolder::open(golden(name)).unwrap());
        assert_eq!(old.config(), new.config(), "{name}");
        assert_eq!(new.config().family.model_type(), *name);
    }
}

#[test]
fn configurations_become_layers_of_their_routers() {
    let config = |name: &str| HubFolder::open(golden(name)).unwrap().config().clone();
    let v3 = config("deepseek_v3");
    assert_eq!((v3.sparse_layers.clone(), v3.moe.groups), (vec![false, true], Some([4, 2])));
    let moe = v3.moe_config();
    assert_eq!((moe.router.topk_scaling_factor, moe.router.norm_topk_prob), (2.5, Some(true)));
    assert_eq!(moe.router.groups.unwrap().score, GroupScore::TopTwoSum);
    assert_eq!(config("deepseek_v2").moe_config().router.groups.unwrap().score, GroupScore::Max);
    assert_eq!(config("deepseek_v2").moe.shared_expert_intermediate_size, Some(12));
    let gpt = config("gpt_oss");
    assert_eq!(gpt.layer_types, [LayerType::SlidingAttention, LayerType::FullAttention]);
    assert_eq!((gpt.sliding_window, gpt.attention_sinks), (Some(6), true));
    assert_eq!(gpt.moe_config().activation, ExpertActivation::ClampedSwiGlu { alpha: 1.702, limit: 2.5 });
    assert!(!gpt.moe_config().router.pre_softmax && gpt.moe_config().add_bias_linear);
    assert_eq!(config("olmoe").clip_qkv, Some(1.5));
    assert!(matches!(config("olmoe").rope.scaling, RopeScaling::Linear { factor: 2.0 }));
    let qwen = config("qwen2_moe");
    assert!(qwen.tie_word_embeddings && qwen.attention_bias && !qwen.attention_output_bias);
    assert_eq!((qwen.sliding_window, qwen.moe_config().router.norm_topk_prob), (None, Some(false)));
    assert_eq!(config("mixtral").layer_types, [LayerType::SlidingAttention; 2]);
}

/// A folder of a golden one with other tensors and keys.
fn changed(
    name: &str,
    edit: impl FnOnce(&mut BTreeMap<String, FileTensor>, &mut serde_json::Value),
) -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    let mut tensors = read_model_tensors(&golden(name));
    let mut config = json(&golden(name).join("config.json"));
    edit(&mut tensors, &mut config);
    write_safetensors(&temp.path().join("model.safetensors"), &tensors);
    fs::write(temp.path().join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    temp
}

fn new_model(folder: &HubFolder, runtime: &FsepRuntime) -> HubModel {
    HubModel::new(folder.config(), &folder.config().moe_config(), runtime, &plain_device()).unwrap()
}

#[test]
fn what_models_of_a_family_do_not_have_is_ignored_and_copied() {
    let more = |tensors: &mut BTreeMap<String, FileTensor>, _: &mut serde_json::Value| {
        for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.mlp.experts.7.up_proj.weight"] {
            tensors.insert(name.into(), FileTensor { dtype: "F32".into(), shape: vec![2], bytes: vec![1; 8] });
        }
    };
    let source = changed("deepseek_v3", more);
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_x.py", "vocab.json"] {
        fs::write(source.path().join(name), name).unwrap();
    }
    fs::write(source.path().join("optimizer.pt"), "large").unwrap();
    let folder = HubFolder::open(source.path()).unwrap();
    let runtime = FsepRuntime::single();
    let model = folder.load(new_model(&folder, &runtime), &LoadConfig::new()).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let to = temp.path().join("saved");
    folder.save(&runtime, &model, &to, &SaveConfig::new()).unwrap();
    assert_eq!(read_model_tensors(&to), read_model_tensors(source.path()));
    let expected = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_x.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ];
    assert_eq!(files_of(&to), expected);
    assert_eq!(fs::read_to_string(to.join("tokenizer.json")).unwrap(), "tokenizer.json");
}

#[test]
fn tied_heads_are_the_embeddings() {
    // Some folders have the head in spite of it.
    let source = changed("qwen2_moe", |tensors, _| {
        let head = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".into(), head);
    });
    let runtime = FsepRuntime::single();
    let folder = HubFolder::open(source.path()).unwrap();
    let mut model = folder.load(new_model(&folder, &runtime), &LoadConfig::new()).unwrap();
    let temp = tempfile::tempdir().unwrap();
    folder.save(&runtime, &model, temp.path().join("saved"), &SaveConfig::new()).unwrap();
    assert!(read_model_tensors(&temp.path().join("saved")) == read_model_tensors(&golden("qwen2_moe")));
    model.lm_head = Some(LinearConfig::new(32, 96).with_bias(false).init(&plain_device()));
    let folder = HubFolder::open(golden("qwen2_moe")).unwrap();
    let error = folder.load(model, &LoadConfig::new()).unwrap_err().to_string();
    assert!(error.contains("ties it to the embeddings"), "{error}");
}

#[test]
fn a_part_of_a_model_is_read_and_put_back() {
    let runtime = FsepRuntime::single();
    let folder = HubFolder::open(golden("olmoe")).unwrap();
    let block = folder.config().moe_config().init(&runtime, &plain_device());
    let load = LoadConfig::new().with_prefix("model.layers.1.mlp.").with_ignored(["model.*", "lm_head.weight"]);
    let mut block = folder.load(block, &load).unwrap();
    block.router.weight = block.router.weight.map(|weight| weight * 2.0);
    let save = SaveConfig::new().with_prefix("model.layers.1.mlp.").with_ignored(["*"]);
    let temp = tempfile::tempdir().unwrap();
    let to = temp.path().join("saved");
    folder.save(&runtime, &block, &to, &save).unwrap();
    let (before, after) = (read_model_tensors(&golden("olmoe")), read_model_tensors(&to));
    assert!(before.keys().eq(after.keys()));
    for (name, before) in &before {
        let factor = if name == "model.layers.1.mlp.gate.weight" { 2.0 } else { 1.0 };
        let expected: Vec<f32> = before.values().into_iter().map(|value| factor * value).collect();
        assert_eq!(after[name].values(), expected, "{name}");
    }
}

#[test]
fn parameters_keep_their_type_and_files_theirs() {
    let runtime = FsepRuntime::single();
    let folder = HubFolder::open(golden("qwen3_moe")).unwrap();
    let half = HubFolder::open(golden("qwen3_moe_bf16")).unwrap();
    let in_half = cast(new_model(&folder, &runtime), FloatDType::BF16);
    // Single precision to half: what transformers rounded.
    let loaded = folder.load(in_half.clone(), &LoadConfig::new()).unwrap();
    assert_eq!(named_parameters(&loaded), named_parameters(&half.load(in_half, &LoadConfig::new()).unwrap()));
    assert!(named_parameters(&loaded).iter().all(|(_, value)| value.dtype() == DType::BF16));
    let temp = tempfile::tempdir().unwrap();
    half.save(&runtime, &loaded, temp.path().join("half"), &SaveConfig::new()).unwrap();
    assert_eq!(read_model_tensors(&temp.path().join("half")), read_model_tensors(half.path()));
    // A model in single precision that is trained from half is written in half.
    let single = half.load(new_model(&half, &runtime), &LoadConfig::new()).unwrap();
    half.save(&runtime, &single, temp.path().join("again"), &SaveConfig::new()).unwrap();
    assert_eq!(read_model_tensors(&temp.path().join("again")), read_model_tensors(half.path()));
    let config = SaveConfig::new().with_dtype(Some(FloatDType::F16));
    half.save(&runtime, &single, temp.path().join("other"), &config).unwrap();
    let other = read_model_tensors(&temp.path().join("other"));
    assert!(other.values().all(|tensor| tensor.dtype == "F16"));
    assert_eq!(json(&temp.path().join("other/config.json"))["dtype"], "float16");
    let sixteen = HubFolder::open(temp.path().join("other")).unwrap();
    assert_eq!(sixteen.config().dtype, Some(FloatDType::F16));
    let back = sixteen.load(new_model(&half, &runtime), &LoadConfig::new()).unwrap();
    for ((path, back), (_, single)) in named_parameters(&back).into_iter().zip(named_parameters(&single)) {
        assert_close(&path, &back, &single, 1e-3);
    }
    let fails =
        half.save(&runtime, &single, temp.path().join("x"), &SaveConfig::new().with_dtype(Some(FloatDType::Flex32)));
    assert!(matches!(fails, Err(HubError::Option(_))));
}

struct Cast(FloatDType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

fn cast<M: Module>(model: M, dtype: FloatDType) -> M {
    model.map(&mut Cast(dtype))
}

#[derive(Module, Debug)]
struct Head {
    lm_head: Linear,
}

#[test]
fn transposed_layouts_of_layers_are_kept() {
    let (runtime, folder) = (FsepRuntime::single(), HubFolder::open(golden("mixtral")).unwrap());
    let expected = read_model_tensors(folder.path())["lm_head.weight"].values();
    let load = LoadConfig::new().with_ignored(["model.*"]);
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        for is_initialized in [false, true] {
            let config = LinearConfig::new(32, 96).with_bias(false).with_layout(layout);
            let head = Head { lm_head: config.init(&plain_device()) };
            if is_initialized {
                let _ = head.lm_head.weight.val();
            }
            let head = folder.load(head, &load).unwrap();
            assert_eq!(head.lm_head.weight.val().dims(), [32, 96]);
            let weight = head.lm_head.weight.val().transpose().into_data();
            assert_eq!(weight.iter::<f32>().collect::<Vec<_>>(), expected);
            let temp = tempfile::tempdir().unwrap();
            let save = SaveConfig::new().with_ignored(["model.*"]);
            folder.save(&runtime, &head, temp.path().join("saved"), &save).unwrap();
            assert_eq!(read_model_tensors(&temp.path().join("saved"))["lm_head.weight"].values(), expected);
        }
    }
}

#[test]
fn the_dense_layer_is_read_as_well() {
    for name in ["qwen2_moe", "gpt_oss", "gpt_oss_mxfp4"] {
        let folder = HubFolder::open(golden(name)).unwrap();
        let dense = folder.config().moe_config().init_dense(1, 0, &plain_device()).unwrap();
        let load = LoadConfig::new().with_prefix("model.layers.0.mlp.").with_ignored(["*"]);
        let dense = folder.load(dense, &load).unwrap();
        let tensors = plain_tensors(name);
        let weights = expected(folder.config(), &tensors, "model.layers.0.mlp.experts.weight", true);
        assert_eq!(dense.weight.val().into_data().iter::<f32>().collect::<Vec<_>>(), weights, "{name}");
        let temp = tempfile::tempdir().unwrap();
        let save = SaveConfig::new().with_prefix("model.layers.0.mlp.").with_ignored(["*"]);
        folder.save(&FsepRuntime::single(), &dense, temp.path().join("saved"), &save).unwrap();
        let saved = read_model_tensors(&temp.path().join("saved"));
        assert!(saved.iter().all(|(name, tensor)| tensor.values() == tensors[name].values()), "{name}");
    }
}

#[test]
fn callers_are_told_how_far_it_is() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = || {
        let told = told.clone();
        move |progress: Progress<'_>| {
            told.lock().unwrap().push((progress.done, progress.total, progress.last.to_string()))
        }
    };
    let check = |last: &str| {
        let told = std::mem::take(&mut *told.lock().unwrap());
        assert!(told.len() > 2 && told[0] == (0, told[0].1, String::new()), "{told:?}");
        assert!(told.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 == pair[1].1), "{told:?}");
        let end = told.last().unwrap();
        assert!(end.0 == end.1 && told.iter().any(|(.., name)| name == last), "{told:?}");
    };
    let (runtime, folder) = (FsepRuntime::single(), HubFolder::open(golden("mixtral")).unwrap());
    let load = LoadConfig::new().with_progress(tell());
    let model = folder.load(new_model(&folder, &runtime), &load).unwrap();
    check("lm_head.weight");
    let temp = tempfile::tempdir().unwrap();
    let save = SaveConfig::new().with_max_shard_size(1000).with_progress(tell());
    folder.save(&runtime, &model, temp.path().join("saved"), &save).unwrap();
    check("model.norm.weight");
}

#[test]
#[ignore = "needs FSEP_TEST_PYTHON, a Python with transformers 5.24"]
fn transformers_reads_what_was_written() {
    let python = std::env::var("FSEP_TEST_PYTHON").expect("a Python with transformers");
    let script = golden("make_golden.py");
    for name in GOLDEN.into_iter().filter(|name| !name.ends_with("mxfp4") && !name.ends_with("fp8")) {
        for size in [5_000_000_000, 10_000] {
            let temp = tempfile::tempdir().unwrap();
            let to = temp.path().join("saved");
            round_trip(name, 2, &SaveConfig::new().with_max_shard_size(size), &to);
            let mut check = std::process::Command::new(&python);
            check.arg(&script).arg("check").args([&to, &golden(name)]);
            let output = check.output().unwrap();
            assert!(output.status.success(), "{name}: {output:?}");
        }
    }
}
