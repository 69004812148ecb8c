//! MoE blocks of the families that Hugging Face's transformers has: with the same weights, FSEP computes the same, and all
//! gradients are the same, on any number of ranks and under layouts that change. What is golden is in `tests/golden`.

use std::{collections::BTreeMap, fs, ops::Range, sync::Arc};

use burn::tensor::{Gradients, Tensor, TensorData};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    comm::local::LaunchConfig,
    hub::{Family, HubFolder, LoadConfig},
    shard::ExpertShape,
};
use burn_fsep_tests::{FileTensor, assert_close, device, golden, launch, random_layout, read_safetensors};

const TOLERANCE: f64 = 1e-5;
const LAYOUTS: u64 = 3;

/// What transformers has computed with a family's model.
struct Golden(BTreeMap<String, FileTensor>);

impl Golden {
    fn tensor(&self, name: &str) -> TensorData {
        self.0.get(name).unwrap_or_else(|| panic!("there is no `{name}`")).data()
    }
}

/// What one step leaves on a rank: gradients by name, those of the experts as the rank's part.
struct Left {
    output: Vec<f32>,
    d_input: Vec<f32>,
    /// By their names in the family's files.
    replicated: BTreeMap<String, Vec<f32>>,
    d_experts: Vec<f32>,
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter().collect()
}

/// Tokens of a rank: all but the last have one fewer than an equal share.
fn rows_of(rank: usize, ranks: usize, tokens: usize) -> Range<usize> {
    let share = tokens / ranks - usize::from(ranks > 1);
    let end = if rank + 1 == ranks { tokens } else { (rank + 1) * share };
    rank * share..end
}

fn check(name: &str) {
    let path = golden(name);
    let golden = Golden(read_safetensors(&path.join("golden.safetensors")));
    let facts: serde_json::Value = serde_json::from_slice(&fs::read(path.join("golden.json")).unwrap()).unwrap();
    let folder = HubFolder::open(&path).unwrap();
    let config = folder.config().moe_config();
    let family = folder.config().family;
    let prefix = format!("{}.", facts["block.prefix"].as_str().unwrap());
    for ranks in [1, 2, 4] {
        let results = launch(&LaunchConfig::new(ranks), |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let layer =
                config.clone().with_slots_per_rank(Some(slots(ranks, &config))).try_init(&runtime, &device())?;
            let load = LoadConfig::new().with_runtime(&runtime).with_prefix(&prefix).with_ignored(["*"]);
            let layer = folder.load(layer, &load).expect("the block is in the folder");
            (0..LAYOUTS).map(|seed| step(&golden, family, &layer, seed)).collect::<Result<Vec<_>, FsepError>>()
        });
        let results: Vec<Vec<Left>> = results.into_iter().map(Result::unwrap).collect();
        for i in 0..LAYOUTS as usize {
            let parts: Vec<&Left> = results.iter().map(|steps| &steps[i]).collect();
            compare(&golden, family, &config, &parts, &format!("{name}, {ranks} ranks, layout {i}"));
        }
    }
}

fn slots(ranks: usize, config: &FSEPMoEConfig) -> usize {
    (config.num_moe_experts.div_ceil(ranks) + 1).min(config.num_moe_experts)
}

fn step(golden: &Golden, family: Family, layer: &FSEPMoE, seed: u64) -> Result<Left, FsepError> {
    let runtime = layer.runtime();
    let (rank, ranks) = (runtime.rank(), runtime.world_size());
    let old = runtime.layout(0);
    runtime.set_layout(0, Arc::new(random_layout(ranks, old.slots_per_rank(), old.num_experts(), seed)))?;
    let part = |name: &str| {
        let all = Tensor::<2>::from_data(golden.tensor(name), &device());
        let [tokens, width] = all.dims();
        all.slice([rows_of(rank, ranks, tokens), 0..width]).detach()
    };
    let x = part("block.input").require_grad();
    runtime.begin_step(layer)?;
    runtime.run(|| {
        let output = layer.forward(x.clone());
        // The sum over ranks; what is trained on is their mean.
        let grads = ((output.clone() * part("block.grad_output")).sum() * ranks as f64).backward();
        Left {
            output: floats(output.inner()),
            d_input: floats(x.grad(&grads).expect("input gradient") / ranks as f64),
            replicated: replicated_gradients(family, layer, &grads),
            d_experts: floats(layer.experts.weight.val().grad(&grads).expect("experts' gradient")),
        }
    })
}

/// Gradients of the parameters that all ranks have, by their names and in the shapes of the family's files.
fn replicated_gradients(family: Family, layer: &FSEPMoE, grads: &Gradients) -> BTreeMap<String, Vec<f32>> {
    let ranks = layer.runtime().world_size() as f64;
    let of = |weight: Tensor<2>| floats(weight.grad(grads).expect("a gradient").transpose() / ranks);
    let gate = if family == Family::GptOss { "router" } else { "gate" };
    let mut all = BTreeMap::from([(format!("{gate}.weight"), of(layer.router.weight.val()))]);
    if let Some(bias) = &layer.router.bias {
        all.insert(format!("{gate}.bias"), floats(bias.val().grad(grads).expect("a gradient") / ranks));
    }
    if let Some(shared) = &layer.shared_expert {
        let name = match family {
            Family::DeepseekV2 | Family::DeepseekV3 => "shared_experts",
            _ => "shared_expert",
        };
        let projections = [
            ("gate_proj", shared.gate_proj.as_ref().expect("SwiGLU has a gate")),
            ("up_proj", &shared.up_proj),
            ("down_proj", &shared.down_proj),
        ];
        for (projection, linear) in projections {
            all.insert(format!("{name}.{projection}.weight"), of(linear.weight.val()));
        }
        if let Some(gate) = &shared.gate {
            all.insert("shared_expert_gate.weight".into(), of(gate.weight.val()));
        }
    }
    all
}

fn compare(golden: &Golden, family: Family, config: &FSEPMoEConfig, parts: &[&Left], what: &str) {
    let data = |values: Vec<f32>| {
        let len = values.len();
        TensorData::new(values, [len])
    };
    let flat = |name: &str| data(golden.tensor(name).iter().collect());
    let all = |part: fn(&Left) -> &Vec<f32>| parts.iter().flat_map(|left| part(left).iter().copied()).collect();
    let assert_golden = |name: &str, actual: Vec<f32>| {
        assert_close(&format!("{what}: {name}"), &data(actual), &flat(name), TOLERANCE);
    };
    assert_golden("block.output", all(|left| &left.output));
    assert_golden("block.grad_input", all(|left| &left.d_input));
    for name in parts[0].replicated.keys() {
        let mut sum = vec![0.0; parts[0].replicated[name].len()];
        parts.iter().for_each(|left| sum.iter_mut().zip(&left.replicated[name]).for_each(|(sum, d)| *sum += d));
        assert_golden(&format!("block.grad.{name}"), sum);
    }
    let rows = whole_experts(parts, config.num_moe_experts);
    for (name, gradient) in experts_by_name(family, config, &rows) {
        assert_golden(&format!("block.grad.{name}"), gradient);
    }
}

/// The experts' rows, put together from the ranks' shards. `[E][>= P]`
fn whole_experts(parts: &[&Left], experts: usize) -> Vec<Vec<f32>> {
    let shard = parts[0].d_experts.len() / experts;
    let row = |e: usize| parts.iter().flat_map(|left| left.d_experts[e * shard..(e + 1) * shard].to_vec()).collect();
    (0..experts).map(row).collect()
}

/// What the family's files have of the experts' rows.
fn experts_by_name(family: Family, config: &FSEPMoEConfig, rows: &[Vec<f32>]) -> Vec<(String, Vec<f32>)> {
    let (d, f) = (config.hidden_size, config.moe_ffn_hidden_size);
    let shape = ExpertShape { bias: config.add_bias_linear, ..ExpertShape::new(d, f) };
    let down = shape.gate_up_len()..shape.bias_start();
    if family != Family::GptOss {
        let names = match family {
            Family::Mixtral => ["w1", "w3", "w2"],
            _ => ["gate_proj", "up_proj", "down_proj"],
        };
        let parts = [0..f * d, f * d..2 * f * d, down];
        let of_expert = |(e, row): (usize, &Vec<f32>)| {
            let named = names.into_iter().zip(parts.clone());
            named.map(|(name, part)| (format!("experts.{e}.{name}.weight"), row[part].to_vec())).collect::<Vec<_>>()
        };
        return rows.iter().enumerate().flat_map(of_expert).collect();
    }
    // [E, D, 2F] with gate and up in turns, [E, F, D], and the biases likewise.
    let row_of = |at: usize| if at.is_multiple_of(2) { at / 2 } else { f + at / 2 };
    let matrix = |row: &Vec<f32>| -> Vec<f32> {
        (0..d).flat_map(|i| (0..2 * f).map(move |at| (i, at))).map(|(i, at)| row[row_of(at) * d + i]).collect()
    };
    let transposed = |row: &Vec<f32>| -> Vec<f32> {
        let down = &row[down.clone()];
        (0..f).flat_map(|i| (0..d).map(move |o| (i, o))).map(|(i, o)| down[o * f + i]).collect()
    };
    let bias = |row: &Vec<f32>| -> Vec<f32> { (0..2 * f).map(|at| row[shape.bias_start() + row_of(at)]).collect() };
    let down_bias = |row: &Vec<f32>| -> Vec<f32> { row[shape.bias_start() + 2 * f..shape.num_params()].to_vec() };
    vec![
        ("experts.gate_up_proj".into(), rows.iter().flat_map(matrix).collect()),
        ("experts.down_proj".into(), rows.iter().flat_map(transposed).collect()),
        ("experts.gate_up_proj_bias".into(), rows.iter().flat_map(bias).collect()),
        ("experts.down_proj_bias".into(), rows.iter().flat_map(down_bias).collect()),
    ]
}

#[test]
fn mixtral() {
    check("mixtral");
}

#[test]
fn qwen2_moe() {
    check("qwen2_moe");
}

#[test]
fn qwen3_moe() {
    check("qwen3_moe");
}

#[test]
fn olmoe() {
    check("olmoe");
}

#[test]
fn deepseek_v2() {
    check("deepseek_v2");
}

#[test]
fn deepseek_v3() {
    check("deepseek_v3");
}

#[test]
fn gpt_oss() {
    check("gpt_oss");
}
