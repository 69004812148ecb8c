use std::collections::BTreeMap;

use burn_fsep::planner::SplitMix64;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use crate::{
    MakeArgs, MakeFamily, ModelFolder, MoeHfError,
    files::{write_json, write_whole},
};

/// Runs `make`.
///
/// # Errors
///
/// [`MoeHfError`] if an option cannot work or the folder cannot be written.
pub fn make(args: &MakeArgs) -> Result<(), MoeHfError> {
    if args.output.read_dir().map_or(args.output.exists(), |mut entries| entries.next().is_some()) {
        return Err(MoeHfError::Option(format!(
            "--output: {} is there already: give a new folder",
            args.output.display()
        )));
    }
    let folder = write(args)?;
    println!("{}: {}", args.output.display(), folder.describe());
    Ok(())
}

/// Writes the model, and opens it.
pub(crate) fn write(args: &MakeArgs) -> Result<ModelFolder, MoeHfError> {
    args.check()?;
    let weights = args.output.join("model.safetensors");
    std::fs::create_dir_all(&args.output).map_err(MoeHfError::file(&args.output))?;
    write_json(&args.output.join("config.json"), &config(args))?;
    let values: BTreeMap<String, (Vec<usize>, Vec<u8>)> = shapes(args)
        .into_iter()
        .enumerate()
        .map(|(stream, (name, shape))| {
            let values = values(&name, shape.iter().product(), SplitMix64::at(args.seed, stream as u64));
            (name, (shape, values))
        })
        .collect();
    let views = values.iter().map(|(name, (shape, bytes))| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        view.map(|view| (name.as_str(), view)).map_err(|error| MoeHfError::content(&weights, error))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    // As transformers writes it, and asks for it.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| MoeHfError::content(&weights, error))?;
    write_whole(&weights, &bytes)?;
    ModelFolder::open(&args.output)
}

/// Normally distributed numbers of transformers' standard deviation; ones for norms.
fn values(name: &str, count: usize, seed: u64) -> Vec<u8> {
    let mut rng = SplitMix64::new(seed);
    let mut draw = || {
        // Box and Muller's: 1 - unit is never 0.
        let (radius, angle) = ((-2.0 * (1.0 - rng.unit()).ln()).sqrt(), std::f64::consts::TAU * rng.unit());
        0.02 * radius * angle.cos()
    };
    let value = |_| if name.contains("norm") { 1.0 } else { draw() as f32 };
    (0..count).map(value).flat_map(f32::to_le_bytes).collect()
}

/// Names and shapes of all tensors, as the family has them on the hub.
fn shapes(args: &MakeArgs) -> Vec<(String, Vec<usize>)> {
    let MakeArgs { hidden, ffn, family, .. } = *args;
    let (head, is_mixtral) = (hidden / HEADS, family == MakeFamily::Mixtral);
    let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![VOCABULARY, hidden])];
    for layer in 0..args.layers {
        let mut add =
            |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        for (name, heads) in [("q_proj", HEADS), ("k_proj", KEY_VALUE_HEADS), ("v_proj", KEY_VALUE_HEADS)] {
            add(&format!("self_attn.{name}.weight"), &[heads * head, hidden]);
        }
        add("self_attn.o_proj.weight", &[hidden, hidden]);
        match family {
            MakeFamily::Mixtral => {}
            MakeFamily::Olmoe => {
                add("self_attn.q_norm.weight", &[hidden]);
                add("self_attn.k_norm.weight", &[KEY_VALUE_HEADS * head]);
            }
            MakeFamily::Qwen3Moe => {
                add("self_attn.q_norm.weight", &[head]);
                add("self_attn.k_norm.weight", &[head]);
            }
        }
        let block = if is_mixtral { "block_sparse_moe" } else { "mlp" };
        let [gate, up, down] = if is_mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
        add(&format!("{block}.gate.weight"), &[args.experts, hidden]);
        for expert in 0..args.experts {
            for (name, shape) in [(gate, [ffn, hidden]), (up, [ffn, hidden]), (down, [hidden, ffn])] {
                add(&format!("{block}.experts.{expert}.{name}.weight"), &shape);
            }
        }
    }
    shapes.push(("model.norm.weight".into(), vec![hidden]));
    shapes.push(("lm_head.weight".into(), vec![VOCABULARY, hidden]));
    shapes
}

/// Values of a byte.
const VOCABULARY: usize = 256;
const HEADS: usize = 4;
const KEY_VALUE_HEADS: usize = 2;

/// What transformers would write into config.json.
fn config(args: &MakeArgs) -> Value {
    let (model_type, architecture) = match args.family {
        MakeFamily::Mixtral => ("mixtral", "MixtralForCausalLM"),
        MakeFamily::Olmoe => ("olmoe", "OlmoeForCausalLM"),
        MakeFamily::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
    };
    let mut config = json!({
        "architectures": [architecture], "model_type": model_type, "dtype": "float32", "hidden_act": "silu",
        "vocab_size": VOCABULARY, "hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": false,
        "num_experts_per_tok": args.top_k, "router_aux_loss_coef": 0.001, "output_router_logits": false,
        "bos_token_id": null, "eos_token_id": null, "pad_token_id": null,
    });
    let own = match args.family {
        MakeFamily::Mixtral => json!({ "num_local_experts": args.experts, "intermediate_size": args.ffn }),
        MakeFamily::Olmoe => {
            json!({ "num_experts": args.experts, "intermediate_size": args.ffn, "norm_topk_prob": false })
        }
        MakeFamily::Qwen3Moe => json!({
            "num_experts": args.experts, "moe_intermediate_size": args.ffn, "intermediate_size": 2 * args.ffn,
            "head_dim": args.hidden / 4, "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
        }),
    };
    if let (Value::Object(config), Value::Object(own)) = (&mut config, own) {
        config.extend(own);
    }
    config
}
