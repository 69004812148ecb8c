//! Model folders that are not what they say, or not the model's: each is a typed error that names file and tensor, and the model
//! stays as it was.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use burn::{module::Module, nn::LinearConfig, tensor::Tensor};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    comm::local::{LaunchConfig, RankError},
    hub::{HubError, HubFolder, LoadConfig, SaveConfig},
};
use burn_fsep_tests::{
    FileTensor, HubModel, golden, launch, named_parameters, plain_device, read_safetensors, write_safetensors,
};
use serde_json::{Map, Value, json};

const MODEL: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
const NORM: &str = "model.norm.weight";

/// What is done to a folder.
type Damage = fn(&Path);
/// What it is, what is done, and the error: kind, file, tensor.
type Case = (&'static str, Damage, [&'static str; 3]);

fn copy_of(name: &str) -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        if !path.file_name().unwrap().to_string_lossy().starts_with("golden") {
            fs::copy(&path, temp.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    temp
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let mut value: Map<String, Value> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

fn set(folder: &Path, key: &str, value: Value) {
    edit_json(&folder.join(CONFIG), |config| drop(config.insert(key.into(), value)));
}

fn replace_text(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from}");
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut BTreeMap<String, FileTensor>)) {
    let path = folder.join(MODEL);
    let mut tensors = read_safetensors(&path);
    edit(&mut tensors);
    write_safetensors(&path, &tensors);
}

/// The table and the data of a file.
fn parts(folder: &Path) -> (Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(folder.join(MODEL)).unwrap();
    let split = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..split]).unwrap(), bytes[split..].to_vec())
}

fn with_header(folder: &Path, header: &str) {
    let (_, data) = parts(folder);
    fs::write(folder.join(MODEL), [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
}

/// Changes what the table says of the norm.
fn edit_entry(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let (mut table, _) = parts(folder);
    edit(&mut table[NORM]);
    with_header(folder, &serde_json::to_string(&table).unwrap());
}

fn offsets(folder: &Path, edit: fn(u64, u64) -> Value) {
    edit_entry(folder, |entry| {
        let of = |i: usize| entry["data_offsets"][i].as_u64().unwrap();
        entry["data_offsets"] = edit(of(0), of(1));
    });
}

fn header_len(folder: &Path, len: u64) {
    let mut bytes = fs::read(folder.join(MODEL)).unwrap();
    bytes[..8].copy_from_slice(&len.to_le_bytes());
    fs::write(folder.join(MODEL), bytes).unwrap();
}

fn transpose(tensors: &mut BTreeMap<String, FileTensor>, name: &str) {
    tensors.get_mut(name).unwrap().shape.reverse();
}

fn retype(tensors: &mut BTreeMap<String, FileTensor>, name: &str, dtype: &str, shape: &[usize], bytes: usize) {
    let tensor = FileTensor { dtype: dtype.into(), shape: shape.to_vec(), bytes: vec![0; bytes] };
    tensors.insert(name.into(), tensor);
}

/// The model of a golden folder, tried to be loaded from a damaged copy, alone and on two ranks.
fn try_load(name: &str, damaged: &Path) -> Vec<FsepError> {
    let attempt = |runtime: &FsepRuntime, with_runtime: bool| -> Result<(), FsepError> {
        let whole = HubFolder::open(golden(name))?;
        let model = HubModel::new(whole.config(), &whole.config().moe_config(), runtime, &plain_device())?;
        let before = named_parameters(&model);
        let load = LoadConfig::new();
        let load = if with_runtime { load.with_runtime(runtime) } else { load };
        let kept = model.clone();
        let result = HubFolder::open(damaged).and_then(|folder| folder.load(model, &load));
        assert_eq!(named_parameters(&kept), before, "the model was changed");
        Ok(result.map(drop)?)
    };
    let mut errors = vec![attempt(&FsepRuntime::single(), false).expect_err("damaged")];
    errors.extend(on_two(|runtime| attempt(runtime, true)).into_iter().map(|result| result.expect_err("damaged")));
    errors
}

fn check(name: &str, cases: &[Case]) {
    for (what, damage, [kind, file, tensor]) in cases {
        let folder = copy_of(name);
        damage(folder.path());
        for error in try_load(name, folder.path()) {
            let FsepError::Hub(error) = error else { panic!("{name}, {what}: {error}") };
            let found = format!("{error:?}");
            assert!(found.split([' ', '(']).next() == Some(*kind), "{name}, {what}: {found}");
            assert!(error.file().is_some_and(|path| path.ends_with(file)), "{name}, {what}: {error}");
            assert_eq!(error.tensor().unwrap_or(""), *tensor, "{name}, {what}: {error}");
            let message = error.to_string();
            assert!(message.contains(file) && message.contains(tensor), "{name}, {what}: {message}");
        }
    }
}

#[test]
fn configurations_that_are_none() {
    let cases: &[Case] = &[
        ("no configuration", |f| fs::remove_file(f.join(CONFIG)).unwrap(), ["Io", CONFIG, ""]),
        (
            "a folder in its place",
            |f| {
                fs::remove_file(f.join(CONFIG)).unwrap();
                fs::create_dir(f.join(CONFIG)).unwrap();
            },
            ["Io", CONFIG, ""],
        ),
        ("not JSON", |f| fs::write(f.join(CONFIG), "model_type: mixtral").unwrap(), ["Damaged", CONFIG, ""]),
        ("nothing", |f| fs::write(f.join(CONFIG), "").unwrap(), ["Damaged", CONFIG, ""]),
        ("a list", |f| fs::write(f.join(CONFIG), "[]").unwrap(), ["Damaged", CONFIG, ""]),
        ("depth alone", |f| fs::write(f.join(CONFIG), "[".repeat(100_000)).unwrap(), ["Damaged", CONFIG, ""]),
        ("a key twice", |f| replace_text(&f.join(CONFIG), "{", "{\"hidden_size\": 8,"), ["Damaged", CONFIG, ""]),
        ("no family", |f| set(f, "model_type", Value::Null), ["Config", CONFIG, ""]),
        ("a family that is a number", |f| set(f, "model_type", json!(7)), ["Config", CONFIG, ""]),
        ("an unknown family", |f| set(f, "model_type", json!("llama")), ["UnknownFamily", CONFIG, ""]),
        ("more layers than any model", |f| set(f, "num_hidden_layers", json!(70_000)), ["Config", CONFIG, ""]),
        ("a size beyond all", |f| set(f, "hidden_size", json!(1u64 << 40)), ["Config", CONFIG, ""]),
        ("a negative epsilon", |f| set(f, "rms_norm_eps", json!(-1.0)), ["Config", CONFIG, ""]),
        ("no hidden size", |f| set(f, "hidden_size", Value::Null), ["Config", CONFIG, ""]),
        ("hidden size 0", |f| set(f, "hidden_size", json!(0)), ["Config", CONFIG, ""]),
        ("hidden size -1", |f| set(f, "hidden_size", json!(-1)), ["Config", CONFIG, ""]),
        ("hidden size 32.5", |f| set(f, "hidden_size", json!(32.5)), ["Config", CONFIG, ""]),
        ("hidden size in words", |f| set(f, "hidden_size", json!("32")), ["Config", CONFIG, ""]),
        ("more experts a token than experts", |f| set(f, "num_experts_per_tok", json!(9)), ["Config", CONFIG, ""]),
        ("two numbers of experts", |f| set(f, "num_experts", json!(4)), ["Config", CONFIG, ""]),
        ("heads that do not divide", |f| set(f, "num_key_value_heads", json!(3)), ["Config", CONFIG, ""]),
        ("an unknown nonlinearity", |f| set(f, "hidden_act", json!("tanh")), ["Config", CONFIG, ""]),
        ("an unknown type", |f| set(f, "dtype", json!("int3")), ["Config", CONFIG, ""]),
        ("an unknown rope", |f| set(f, "rope_parameters", json!({"rope_type": "x"})), ["Config", CONFIG, ""]),
        (
            "a rope without its factor",
            |f| {
                set(f, "rope_scaling", json!({"type": "linear"}));
            },
            ["Config", CONFIG, ""],
        ),
        (
            "an unknown quantisation",
            |f| {
                set(f, "quantization_config", json!({"quant_method": "gptq"}));
            },
            ["Config", CONFIG, ""],
        ),
        (
            "fewer experts than files have",
            |f| set(f, "num_local_experts", json!(4)),
            ["NumExperts", MODEL, "model.layers.0.block_sparse_moe.gate.weight"],
        ),
        (
            "more experts than files have",
            |f| set(f, "num_local_experts", json!(16)),
            ["NumExperts", MODEL, "model.layers.0.block_sparse_moe.gate.weight"],
        ),
    ];
    check("mixtral", cases);
}

#[test]
fn files_that_are_no_tensor_files() {
    let cases: &[Case] = &[
        (
            "a folder in its place",
            |f| {
                fs::remove_file(f.join(MODEL)).unwrap();
                fs::create_dir(f.join(MODEL)).unwrap();
            },
            ["Io", MODEL, ""],
        ),
        ("nothing", |f| fs::write(f.join(MODEL), "").unwrap(), ["Damaged", MODEL, ""]),
        ("seven bytes", |f| fs::write(f.join(MODEL), [0; 7]).unwrap(), ["Damaged", MODEL, ""]),
        ("no header", |f| header_len(f, 0), ["Damaged", MODEL, ""]),
        ("a header longer than the file", |f| header_len(f, 1 << 30), ["Damaged", MODEL, ""]),
        ("a header of all memory", |f| header_len(f, u64::MAX), ["Damaged", MODEL, ""]),
        ("half a header", |f| header_len(f, 100), ["Damaged", MODEL, ""]),
        ("a header that is no JSON", |f| with_header(f, "{]"), ["Damaged", MODEL, ""]),
        ("a header that is a list", |f| with_header(f, "[]"), ["Damaged", MODEL, ""]),
        ("a header of nothing but depth", |f| with_header(f, &"[".repeat(100_000)), ["Damaged", MODEL, ""]),
        ("a header that describes nothing", |f| with_header(f, "{}"), ["Damaged", MODEL, ""]),
        (
            "metadata that are no words",
            |f| {
                let (mut table, _) = parts(f);
                table.insert("__metadata__".into(), json!({"format": 1}));
                with_header(f, &serde_json::to_string(&table).unwrap());
            },
            ["Damaged", MODEL, ""],
        ),
        (
            "a tensor twice",
            |f| {
                let (table, _) = parts(f);
                let text = serde_json::to_string(&table).unwrap();
                with_header(f, &text.replacen('{', &format!("{{\"{NORM}\":{},", table[NORM]), 1));
            },
            ["Damaged", MODEL, ""],
        ),
        ("an unknown type", |f| edit_entry(f, |e| e["dtype"] = json!("F12")), ["Damaged", MODEL, NORM]),
        ("no shape", |f| edit_entry(f, |e| drop(e.as_object_mut().unwrap().remove("shape"))), ["Damaged", MODEL, NORM]),
        ("an unknown field", |f| edit_entry(f, |e| e["more"] = json!(1)), ["Damaged", MODEL, NORM]),
        ("no entry", |f| edit_entry(f, |e| *e = json!(3)), ["Damaged", MODEL, NORM]),
        ("a negative size", |f| edit_entry(f, |e| e["shape"] = json!([-32])), ["Damaged", MODEL, NORM]),
        (
            "an endless tensor",
            |f| edit_entry(f, |e| e["shape"] = json!([u64::MAX, u64::MAX])),
            ["Damaged", MODEL, NORM],
        ),
        ("a shape of another size", |f| edit_entry(f, |e| e["shape"] = json!([31])), ["Damaged", MODEL, NORM]),
        ("a type of another size", |f| edit_entry(f, |e| e["dtype"] = json!("BF16")), ["Damaged", MODEL, NORM]),
        ("three places", |f| offsets(f, |a, b| json!([a, b, b])), ["Damaged", MODEL, NORM]),
        ("an end before the start", |f| offsets(f, |a, b| json!([b, a])), ["Damaged", MODEL, NORM]),
        ("a place in another tensor", |f| offsets(f, |a, b| json!([a - 4, b - 4])), ["Damaged", MODEL, NORM]),
        (
            "a place beyond the file",
            |f| offsets(f, |a, b| json!([a + (1 << 40), b + (1 << 40)])),
            ["Damaged", MODEL, NORM],
        ),
        (
            "a place beyond all files",
            |f| offsets(f, |_, _| json!([u64::MAX - 128, u64::MAX])),
            ["Damaged", MODEL, NORM],
        ),
        (
            "a file that is cut off",
            |f| {
                let bytes = fs::read(f.join(MODEL)).unwrap();
                fs::write(f.join(MODEL), &bytes[..bytes.len() - 4]).unwrap();
            },
            ["Damaged", MODEL, NORM],
        ),
        (
            "more data",
            |f| {
                let bytes = fs::read(f.join(MODEL)).unwrap();
                fs::write(f.join(MODEL), [&bytes[..], &[0; 8]].concat()).unwrap();
            },
            ["Damaged", MODEL, ""],
        ),
    ];
    check("mixtral", cases);
}

#[test]
fn tensors_that_are_not_the_models() {
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    const K: &str = "model.layers.0.self_attn.k_proj.weight";
    const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.3.w1.weight";
    const DOWN: &str = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
    const GATE: &str = "model.layers.0.block_sparse_moe.gate.weight";
    let cases: &[Case] = &[
        ("no norm", |f| edit_tensors(f, |t| drop(t.remove(NORM))), ["Missing", "", NORM]),
        ("no router", |f| edit_tensors(f, |t| drop(t.remove(GATE))), ["Missing", "", GATE]),
        ("no down of expert 3 of layer 1", |f| edit_tensors(f, |t| drop(t.remove(DOWN))), ["Missing", "", DOWN]),
        (
            "no expert 3 of layer 1",
            |f| {
                edit_tensors(f, |t| t.retain(|name, _| !name.contains("layers.1.block_sparse_moe.experts.3.")));
            },
            ["Missing", "", EXPERT],
        ),
        (
            "no experts in layer 1",
            |f| {
                edit_tensors(f, |t| t.retain(|name, _| !name.contains("layers.1.block_sparse_moe.experts.")));
            },
            ["Missing", "", "model.layers.1.block_sparse_moe.experts.0.w1.weight"],
        ),
        ("no layer 1", |f| edit_tensors(f, |t| t.retain(|name, _| !name.contains("layers.1."))), ["Missing", "", Q]),
        ("no tensors", |f| edit_tensors(f, BTreeMap::clear), ["Missing", "", "model.embed_tokens.weight"]),
        (
            "a tensor more",
            |f| edit_tensors(f, |t| drop(t.insert("model.more".into(), t[NORM].clone()))),
            ["Unused", MODEL, "model.more"],
        ),
        (
            "a bias more",
            |f| {
                edit_tensors(f, |t| drop(t.insert("model.layers.0.self_attn.q_proj.bias".into(), t[NORM].clone())));
            },
            ["Unused", MODEL, "model.layers.0.self_attn.q_proj.bias"],
        ),
        (
            "a layer more",
            |f| {
                edit_tensors(f, |t| drop(t.insert("model.layers.2.input_layernorm.weight".into(), t[NORM].clone())));
            },
            ["Unused", MODEL, "model.layers.2.input_layernorm.weight"],
        ),
        (
            "another name",
            |f| {
                edit_tensors(f, |t| {
                    let tensor = t.remove(Q).unwrap();
                    t.insert(Q.replace("q_proj", "query"), tensor);
                });
            },
            ["Missing", "", Q],
        ),
        (
            "an expert more",
            |f| {
                edit_tensors(f, |t| {
                    let more = t[EXPERT].clone();
                    t.insert("model.layers.1.block_sparse_moe.experts.8.w1.weight".into(), more);
                });
            },
            ["NumExperts", MODEL, "model.layers.1.block_sparse_moe.experts.8.w1.weight"],
        ),
        ("a transposed projection", |f| edit_tensors(f, |t| transpose(t, K)), ["Shape", MODEL, K]),
        ("a transposed expert", |f| edit_tensors(f, |t| transpose(t, EXPERT)), ["Shape", MODEL, EXPERT]),
        (
            "a flat expert",
            |f| edit_tensors(f, |t| t.get_mut(DOWN).unwrap().shape = vec![12 * 32]),
            ["Shape", MODEL, DOWN],
        ),
        (
            "a transposed router",
            |f| edit_tensors(f, |t| t.get_mut(GATE).unwrap().shape = vec![8, 2, 16]),
            ["Shape", MODEL, GATE],
        ),
        ("whole numbers", |f| edit_tensors(f, |t| t.get_mut(Q).unwrap().dtype = "I32".into()), ["Dtype", MODEL, Q]),
        ("FP8 without scales", |f| edit_tensors(f, |t| retype(t, Q, "F8_E4M3", &[32, 32], 1024)), ["Scales", MODEL, Q]),
        (
            "scales of nothing",
            |f| {
                edit_tensors(f, |t| retype(t, "model.x_scale_inv", "F32", &[1], 4));
            },
            ["Scales", MODEL, "model.x_scale_inv"],
        ),
        (
            "scales of what has none",
            |f| {
                edit_tensors(f, |t| retype(t, &format!("{Q}_scale_inv"), "F32", &[1, 1], 4));
            },
            ["Scales", MODEL, Q],
        ),
        (
            "experts twice, fused, too",
            |f| {
                edit_tensors(f, |t| {
                    retype(
                        t,
                        "model.layers.1.block_sparse_moe.experts.gate_up_proj",
                        "F32",
                        &[8, 24, 32],
                        8 * 24 * 32 * 4,
                    );
                });
            },
            ["TwoNames", MODEL, "model.layers.1.block_sparse_moe.experts.0.w1.weight"],
        ),
        (
            "a router twice",
            |f| {
                edit_tensors(f, |t| drop(t.insert("model.layers.0.mlp.gate.weight".into(), t[GATE].clone())));
            },
            ["TwoNames", MODEL, GATE],
        ),
        (
            "experts under both names",
            |f| {
                edit_tensors(f, |t| {
                    let name = "model.layers.1.mlp.experts.0.w1.weight";
                    t.insert(name.into(), t[EXPERT].clone());
                });
            },
            ["TwoNames", MODEL, "model.layers.1.block_sparse_moe.experts.0.w1.weight"],
        ),
    ];
    check("mixtral", cases);
    // The same model under other names: D = 2F, so that only names tell gate and up from down.
    let cases: &[Case] = &[
        (
            "fused experts of another number",
            |f| {
                edit_tensors(f, |t| {
                    let tensor = t.get_mut("model.layers.0.mlp.experts.down_proj").unwrap();
                    (tensor.shape, tensor.bytes) = (vec![2, 32, 16], tensor.bytes[..2 * 32 * 16 * 4].to_vec());
                });
            },
            ["NumExperts", MODEL, "model.layers.0.mlp.experts.down_proj"],
        ),
        (
            "one half of fused experts",
            |f| {
                edit_tensors(f, |t| drop(t.remove("model.layers.0.mlp.experts.down_proj")));
            },
            ["Missing", "", "model.layers.0.mlp.experts.down_proj"],
        ),
        (
            "fused experts of another shape",
            |f| {
                edit_tensors(f, |t| t.get_mut("model.layers.0.mlp.experts.down_proj").unwrap().shape = vec![4, 16, 32]);
            },
            ["Shape", MODEL, "model.layers.0.mlp.experts.down_proj"],
        ),
    ];
    check("mixtral_fused", cases);
}

/// A file of several, and its first tensor.
const FILE: &str = "model-00002-of-00004.safetensors";
const IN_FILE: &str = "model.embed_tokens.weight";

fn set_file(folder: &Path, file: Value) {
    edit_json(&folder.join(INDEX), |index| index["weight_map"][IN_FILE] = file);
}

#[test]
fn indices_that_lie() {
    let cases: &[Case] = &[
        ("not JSON", |f| fs::write(f.join(INDEX), "x").unwrap(), ["Damaged", INDEX, ""]),
        ("no map", |f| edit_json(&f.join(INDEX), |i| drop(i.remove("weight_map"))), ["Damaged", INDEX, ""]),
        ("a map that is none", |f| edit_json(&f.join(INDEX), |i| i["weight_map"] = json!([])), ["Damaged", INDEX, ""]),
        ("an empty map", |f| edit_json(&f.join(INDEX), |i| i["weight_map"] = json!({})), ["Damaged", INDEX, ""]),
        ("a number in place of a file", |f| set_file(f, json!(1)), ["Damaged", INDEX, ""]),
        (
            "a tensor twice",
            |f| {
                replace_text(
                    &f.join(INDEX),
                    &format!("\"{IN_FILE}\""),
                    &format!("\"{IN_FILE}\": \"x\", \"{IN_FILE}\""),
                );
            },
            ["Damaged", INDEX, ""],
        ),
        ("a file that is not there", |f| set_file(f, json!("model-9.safetensors")), ["Damaged", INDEX, IN_FILE]),
        ("a file that was deleted", |f| fs::remove_file(f.join(FILE)).unwrap(), ["Damaged", INDEX, IN_FILE]),
        ("the folder above", |f| set_file(f, json!("../model.safetensors")), ["UnsafePath", INDEX, ""]),
        ("a folder below", |f| set_file(f, json!("a/model.safetensors")), ["UnsafePath", INDEX, ""]),
        ("an absolute path", |f| set_file(f, json!("/etc/passwd.safetensors")), ["UnsafePath", INDEX, ""]),
        ("a file of another kind", |f| set_file(f, json!("config.json")), ["UnsafePath", INDEX, ""]),
        ("no name", |f| set_file(f, json!("")), ["UnsafePath", INDEX, ""]),
        (
            "the wrong file",
            |f| set_file(f, json!("model-00001-of-00004.safetensors")),
            ["Damaged", "model-00001-of-00004.safetensors", IN_FILE],
        ),
        (
            "a tensor that is in no file",
            |f| {
                edit_json(&f.join(INDEX), |i| i["weight_map"]["model.more"] = json!(FILE));
            },
            ["Damaged", FILE, "model.more"],
        ),
        (
            "a tensor that is in a file alone",
            |f| {
                edit_json(&f.join(INDEX), |i| drop(i["weight_map"].as_object_mut().unwrap().remove(IN_FILE)));
            },
            ["Damaged", FILE, IN_FILE],
        ),
        (
            "a tensor in two files",
            |f| {
                let (first, second) = (f.join(FILE), f.join("model-00001-of-00004.safetensors"));
                let mut tensors = read_safetensors(&second);
                tensors.insert(IN_FILE.into(), read_safetensors(&first)[IN_FILE].clone());
                write_safetensors(&second, &tensors);
            },
            ["Damaged", "model-00001-of-00004.safetensors", IN_FILE],
        ),
        ("one file beside it", |f| fs::copy(f.join(FILE), f.join(MODEL)).map(drop).unwrap(), ["Damaged", INDEX, ""]),
    ];
    check("mixtral_sharded", cases);
    let none = tempfile::tempdir().unwrap();
    fs::copy(golden("mixtral").join(CONFIG), none.path().join(CONFIG)).unwrap();
    assert!(matches!(HubFolder::open(none.path()), Err(HubError::NoWeights { .. })));
    fs::write(none.path().join("pytorch_model.bin"), "").unwrap();
    let error = HubFolder::open(none.path()).unwrap_err().to_string();
    assert!(error.contains("save_pretrained"), "{error}");
}

#[cfg(unix)]
#[test]
fn links_that_lead_out_of_the_folder() {
    let cases: &[Case] = &[
        (
            "a link to another folder",
            |f| {
                fs::remove_file(f.join(FILE)).unwrap();
                std::os::unix::fs::symlink(golden("mixtral_sharded").join(FILE), f.join(FILE)).unwrap();
            },
            ["UnsafePath", INDEX, ""],
        ),
        (
            "a link to nothing",
            |f| {
                fs::remove_file(f.join(FILE)).unwrap();
                std::os::unix::fs::symlink("nothing", f.join(FILE)).unwrap();
            },
            ["Io", FILE, ""],
        ),
    ];
    check("mixtral_sharded", cases);
}

#[test]
fn quantised_tensors_that_cannot_be_decoded() {
    const Q: &str = "model.layers.0.self_attn.q_b_proj.weight";
    const SCALE: &str = "model.layers.0.self_attn.q_b_proj.weight_scale_inv";
    let cases: &[Case] = &[
        ("no scales", |f| edit_tensors(f, |t| drop(t.remove(SCALE))), ["Scales", MODEL, Q]),
        ("scales alone", |f| edit_tensors(f, |t| drop(t.remove(Q))), ["Scales", MODEL, SCALE]),
        ("more scales", |f| edit_tensors(f, |t| retype(t, SCALE, "F32", &[2, 2], 16)), ["Scales", MODEL, Q]),
        (
            "scales of another type",
            |f| edit_tensors(f, |t| t.get_mut(SCALE).unwrap().dtype = "I32".into()),
            ["Scales", MODEL, Q],
        ),
        (
            "no quantisation",
            |f| set(f, "quantization_config", Value::Null),
            ["Scales", MODEL, "model.layers.0.mlp.experts.0.down_proj.weight"],
        ),
        (
            "blocks of no rows",
            |f| {
                set(f, "quantization_config", json!({"quant_method": "fp8", "weight_block_size": [0, 128]}));
            },
            ["Config", CONFIG, ""],
        ),
        (
            "smaller blocks",
            |f| {
                set(f, "quantization_config", json!({"quant_method": "fp8", "weight_block_size": [64, 64]}));
            },
            ["Scales", MODEL, "model.layers.0.mlp.experts.0.down_proj.weight"],
        ),
    ];
    check("deepseek_v3_fp8", cases);
    const GATE_UP: &str = "model.layers.0.mlp.experts.gate_up_proj";
    const BLOCKS: &str = "model.layers.0.mlp.experts.gate_up_proj_blocks";
    const SCALES: &str = "model.layers.0.mlp.experts.gate_up_proj_scales";
    let cases: &[Case] = &[
        ("no scales", |f| edit_tensors(f, |t| drop(t.remove(SCALES))), ["Scales", MODEL, BLOCKS]),
        ("no blocks", |f| edit_tensors(f, |t| drop(t.remove(BLOCKS))), ["Scales", MODEL, SCALES]),
        (
            "blocks of 16 values",
            |f| edit_tensors(f, |t| t.get_mut(BLOCKS).unwrap().shape = vec![3, 128, 2, 8]),
            ["Scales", MODEL, BLOCKS],
        ),
        (
            "scales of another shape",
            |f| edit_tensors(f, |t| t.get_mut(SCALES).unwrap().shape = vec![3, 64, 2]),
            ["Scales", MODEL, BLOCKS],
        ),
        (
            "blocks of single precision",
            |f| {
                edit_tensors(f, |t| {
                    let tensor = t.get_mut(BLOCKS).unwrap();
                    (tensor.dtype, tensor.shape) = ("F32".into(), vec![3, 128, 1, 4]);
                });
            },
            ["Scales", MODEL, BLOCKS],
        ),
        (
            "plain experts beside",
            |f| {
                edit_tensors(f, |t| retype(t, GATE_UP, "BF16", &[3, 32, 128], 3 * 32 * 128 * 2));
            },
            ["TwoNames", MODEL, BLOCKS],
        ),
        (
            "other sizes",
            |f| {
                edit_tensors(f, |t| {
                    t.get_mut(BLOCKS).unwrap().shape = vec![3, 64, 2, 16];
                    t.get_mut(SCALES).unwrap().shape = vec![3, 64, 2];
                    t.get_mut(BLOCKS).unwrap().bytes.truncate(3 * 64 * 2 * 16);
                    t.get_mut(SCALES).unwrap().bytes.truncate(3 * 64 * 2);
                });
            },
            ["Shape", MODEL, GATE_UP],
        ),
    ];
    check("gpt_oss_mxfp4", cases);
}

#[test]
fn files_that_change_after_they_were_opened() {
    let temp = copy_of("mixtral");
    let folder = HubFolder::open(temp.path()).unwrap();
    let runtime = FsepRuntime::single();
    let new = || HubModel::new(folder.config(), &folder.config().moe_config(), &runtime, &plain_device()).unwrap();
    folder.load(new(), &LoadConfig::new()).unwrap();
    let path = temp.path().join(MODEL);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 4]).unwrap();
    let error = folder.load(new(), &LoadConfig::new()).unwrap_err();
    assert!(matches!(&error, HubError::Changed { file, .. } if *file == path), "{error}");
    fs::remove_file(&path).unwrap();
    let error = folder.load(new(), &LoadConfig::new()).unwrap_err();
    assert!(matches!(&error, HubError::Io { path: file, .. } if *file == path), "{error}");
}

/// What two ranks make of a folder each.
fn on_two<T: Send>(program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync) -> Vec<Result<T, FsepError>> {
    let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(20));
    let results = launch(&config, |comm| program(&FsepRuntime::new(comm)?));
    let results = results.into_iter().map(|result| match result {
        Err(RankError::Failed { error, .. }) => Err(error),
        Err(error) => panic!("{error}"),
        Ok(result) => Ok(result),
    });
    results.collect()
}

#[test]
fn all_ranks_fail_if_one_does() {
    let (damaged, other) = (copy_of("mixtral"), copy_of("mixtral"));
    edit_tensors(damaged.path(), |tensors| drop(tensors.remove(NORM)));
    set(other.path(), "rms_norm_eps", json!(1e-4));
    let load = |folder: &Path| {
        on_two(|runtime| {
            let path = if runtime.rank() == 1 { folder.to_path_buf() } else { golden("mixtral") };
            let folder = HubFolder::open(path)?;
            let model = HubModel::new(folder.config(), &folder.config().moe_config(), runtime, &plain_device())?;
            Ok(folder.load(model, &LoadConfig::new().with_runtime(runtime)).map(drop)?)
        })
    };
    let results = load(damaged.path());
    assert!(matches!(&results[1], Err(FsepError::Hub(HubError::Missing { .. }))), "{results:?}");
    assert!(matches!(&results[0], Err(FsepError::Hub(HubError::Peer { rank: 1, message })) if message.contains(NORM)));
    for result in load(other.path()) {
        assert!(matches!(&result, Err(FsepError::Hub(HubError::Divergence { rank: 1, .. }))), "{result:?}");
    }
}

#[derive(Module, Debug)]
struct TwoBlocks {
    mlp: FSEPMoE,
    block_sparse_moe: FSEPMoE,
}

#[test]
fn two_parameters_of_one_tensor_are_refused() {
    let (folder, runtime) = (HubFolder::open(golden("mixtral")).unwrap(), FsepRuntime::single());
    let block = || folder.config().moe_config().init(&runtime, &plain_device());
    let model = TwoBlocks { mlp: block(), block_sparse_moe: block() };
    let load = LoadConfig::new().with_prefix("model.layers.0.").with_ignored(["*"]);
    let error = folder.load(model, &load).unwrap_err();
    let gate = "model.layers.0.block_sparse_moe.gate.weight";
    assert!(
        matches!(&error, HubError::MappedTwice { file, tensor, parameters }
        if file.ends_with(MODEL) && tensor == gate && parameters[1] == "block_sparse_moe.router.weight"),
        "{error}"
    );
}

#[test]
fn models_of_other_experts_are_refused() {
    let folder = HubFolder::open(golden("mixtral")).unwrap();
    let load = LoadConfig::new().with_prefix("model.layers.0.mlp.").with_ignored(["*"]);
    let moe = folder.config().moe_config();
    for (moe, expected) in [
        (FSEPMoEConfig { num_moe_experts: 4, ..moe.clone() }, "it has 4 experts, config.json 8"),
        (
            FSEPMoEConfig { moe_ffn_hidden_size: 6, ..moe.clone() },
            "has the shape [12, 32], but the model's `experts.weight` needs [6, 32]",
        ),
        (moe.clone().with_add_bias_linear(true), "has no tensor `model.layers.0.block_sparse_moe.experts.0.w1.bias`"),
        (moe.with_activation(burn_fsep::moe::ExpertActivation::Gelu), "its experts have no gate"),
    ] {
        let block = moe.init(&FsepRuntime::single(), &plain_device());
        let error = folder.load(block, &load).unwrap_err();
        // The router is first where it is of another number of experts.
        let text = error.to_string();
        assert!(
            text.contains(expected) || matches!(error, HubError::Shape { .. }) && expected.starts_with("it has"),
            "{text}"
        );
    }
    let errors = on_two(|runtime| {
        let block = folder.config().moe_config().init(runtime, &plain_device());
        Ok(folder.load(block, &load).map(drop)?)
    });
    for error in errors {
        assert!(error.unwrap_err().to_string().contains("with_runtime"), "a shard needs its runtime");
    }
    let linear = LinearConfig::new(4, 4).init(&plain_device());
    let error = folder.load(linear, &LoadConfig::new()).unwrap_err();
    assert!(matches!(&error, HubError::Missing { tensor, .. } if tensor == "weight"), "{error}");
}

#[test]
fn what_cannot_be_written_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (source, to) = (HubFolder::open(golden("mixtral")).unwrap(), temp.path().join("saved"));
    let save = |change: fn(usize, HubModel) -> HubModel, config: &SaveConfig| {
        let results = on_two(|runtime| {
            let model = HubModel::new(source.config(), &source.config().moe_config(), runtime, &plain_device())?;
            let model = source.load(model, &LoadConfig::new().with_runtime(runtime))?;
            Ok(source.save(runtime, &change(runtime.rank(), model), &to, config)?)
        });
        let error = |result: Result<(), FsepError>| match result {
            Err(FsepError::Hub(error)) => error,
            other => panic!("{other:?}"),
        };
        let errors: Vec<_> = results.into_iter().map(error).collect();
        assert!(!temp.path().join(".saved.partial").exists(), "{errors:?}");
        errors
    };
    for error in save(|_, model| model, &SaveConfig::new().with_max_shard_size(0)) {
        assert!(matches!(error, HubError::Option(_)), "{error}");
    }
    let other = |rank: usize, mut model: HubModel| {
        let change = |gamma: Tensor<1>| gamma + rank as f32;
        model.model.norm.gamma = model.model.norm.gamma.map(change);
        model
    };
    for error in save(other, &SaveConfig::new()) {
        assert!(
            matches!(&error, HubError::Divergence { what, rank: 1, .. } if what.contains("model.norm.gamma")),
            "{error}"
        );
    }
    let without_head = |_: usize, mut model: HubModel| {
        model.lm_head = None;
        model
    };
    for error in save(without_head, &SaveConfig::new()) {
        assert!(matches!(&error, HubError::Unused { tensor, .. } if tensor == "lm_head.weight"), "{error}");
    }
    assert!(!to.exists());
    // What is there stays as it is.
    fs::create_dir(&to).unwrap();
    fs::write(to.join("notes"), "mine").unwrap();
    let errors = save(|_, model| model, &SaveConfig::new());
    assert!(errors.iter().any(|error| matches!(error, HubError::Exists { path } if *path == to)), "{errors:?}");
    assert_eq!(fs::read_to_string(to.join("notes")).unwrap(), "mine");
}
