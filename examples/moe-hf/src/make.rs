use std::path::Path;

use burn::tensor::Device;
use burn_fsep::{
    FsepRuntime, FsepRuntimeConfig,
    comm::local::{LaunchConfig, launch},
};
use serde_json::{Value, json};

use crate::{Dtype, MakeArgs, MakeFamily, ModelFolder, MoeHfError, files::write_json, model::CausalLm};

/// Runs `make`.
///
/// # Errors
///
/// [`MoeHfError`] if an option cannot work or the folder cannot be written.
pub fn make(args: &MakeArgs) -> Result<(), MoeHfError> {
    let folder = write(args)?;
    println!("{}: {}", args.output.display(), folder.describe());
    Ok(())
}

/// Writes the model, and opens it.
pub(crate) fn write(args: &MakeArgs) -> Result<ModelFolder, MoeHfError> {
    args.check()?;
    std::fs::create_dir_all(&args.output).map_err(MoeHfError::file(&args.output))?;
    write_json(&args.output.join("config.json"), &config(args))?;
    todo!()
}

/// What transformers would write into config.json.
fn config(args: &MakeArgs) -> Value {
    let (model_type, architecture) = match args.family {
        MakeFamily::Mixtral => ("mixtral", "MixtralForCausalLM"),
        MakeFamily::Olmoe => ("olmoe", "OlmoeForCausalLM"),
        MakeFamily::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
    };
    let mut config = json!({
        "architectures": [architecture], "model_type": model_type, "dtype": "float32", "hidden_act": "silu",
        "vocab_size": 256, "hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
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
