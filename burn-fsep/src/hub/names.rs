//! From the paths of a model's parameters to the names of tensors in a folder.

use super::{Family, ModelConfig, model::ModelParam};

/// Containers of a parameter that is an MoE block's.
const BLOCKS: [&str; 2] = ["Struct:FSEPMoE", "Struct:DenseMoE"];

/// What a parameter is in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// One tensor, under one of these names.
    Tensor {
        names: Vec<String>,
        /// Whether the folder has the transpose of what the model computes with.
        is_transposed: bool,
    },
    /// The experts of the block that has one of these names.
    Experts { blocks: Vec<String> },
}

/// Where a parameter stands in a folder of the family; `prefix` stands before the paths of the model.
pub(super) fn target(param: &ModelParam, family: Family, prefix: &str) -> Target {
    let fields = &param.fields;
    let join = |fields: &[(String, String)]| {
        let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
        format!("{prefix}{}", names.join("."))
    };
    let block = fields.iter().position(|(_, container)| BLOCKS.contains(&container.as_str()));
    if let Some(block) = block {
        let blocks = block_names(family, join(&fields[..block]).trim_end_matches('.'));
        let rest: Vec<&str> = fields[block..].iter().map(|(name, _)| name.as_str()).collect();
        return match rest_of_block(family, &rest) {
            None => Target::Experts { blocks },
            Some((rest, is_transposed)) => {
                let names = blocks.iter().map(|block| within(block, &rest)).collect();
                Target::Tensor { names, is_transposed }
            }
        };
    }
    if param.experts.is_some() {
        // Beside a router of the user's own: `BLOCK.experts.weight`.
        let is_experts = fields.len() >= 2 && fields[fields.len() - 2].0 == "experts";
        let outer = fields.len().saturating_sub(if is_experts { 2 } else { 1 });
        return Target::Experts { blocks: block_names(family, join(&fields[..outer]).trim_end_matches('.')) };
    }
    let (name, container) = fields.last().map_or(("", ""), |(name, container)| (name.as_str(), container.as_str()));
    let (name, is_transposed) = match (container, name) {
        ("Struct:Linear", "weight") => ("weight", true),
        ("Struct:RmsNorm" | "Struct:LayerNorm", "gamma") => ("weight", false),
        ("Struct:LayerNorm", "beta") => ("bias", false),
        _ => (name, false),
    };
    let outer = join(&fields[..fields.len().saturating_sub(1)]);
    Target::Tensor { names: vec![within(outer.trim_end_matches('.'), name)], is_transposed }
}

/// The names that a block at `path` may have in files.
fn block_names(family: Family, path: &str) -> Vec<String> {
    let names = family.block_names();
    let (outer, last) = path.rsplit_once('.').map_or(("", path), |(outer, last)| (outer, last));
    if names.contains(&last) { names.iter().map(|name| within(outer, name)).collect() } else { vec![path.into()] }
}

/// The name in the block, and whether it is transposed there; `None` for the experts.
fn rest_of_block(family: Family, rest: &[&str]) -> Option<(String, bool)> {
    let router = family.router();
    Some(match *rest {
        ["experts", "weight"] | ["weight"] => return None,
        ["router", "weight"] => (format!("{router}.weight"), true),
        ["router", "expert_bias"] => (format!("{router}.e_score_correction_bias"), false),
        ["router", name] => (format!("{router}.{name}"), false),
        ["shared_expert", "gate", name] => (format!("{}_gate.{name}", family.shared_expert()), name == "weight"),
        ["shared_expert", projection, name] => {
            (format!("{}.{projection}.{name}", family.shared_expert()), name == "weight")
        }
        _ => (rest.join("."), false),
    })
}

fn within(outer: &str, name: &str) -> String {
    if outer.is_empty() { name.into() } else { format!("{outer}.{name}") }
}

/// Whether a tensor is none of the decoder's, by its name alone.
pub(super) fn is_ignored(config: &ModelConfig, name: &str) -> bool {
    // Frequencies, which older versions of transformers saved: they follow from the configuration.
    if name.ends_with("rotary_emb.inv_freq") {
        return true;
    }
    // Layers that predict tokens beyond the next one stand behind the decoder's.
    config.family == Family::DeepseekV3
        && name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok())
            .is_some_and(|layer| layer >= config.num_hidden_layers)
}

/// Whether a name is `pattern`, in which `*` stands for anything.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(first) else { return false };
    let (middle, last) = rest.rsplit_once('*').map_or(("", rest), |(middle, last)| (middle, last));
    for part in middle.split('*').filter(|part| !part.is_empty()) {
        match name.find(part) {
            Some(at) => name = &name[at + part.len()..],
            None => return false,
        }
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;

    fn of(family: Family, path: &[(&str, &str)]) -> Target {
        let param = ModelParam {
            path: String::new(),
            fields: path.iter().map(|(name, container)| (name.to_string(), format!("Struct:{container}"))).collect(),
            dtype: Dtype::F32,
            shape: Vec::new(),
            is_transposed: false,
            experts: None,
        };
        target(&param, family, "")
    }

    fn tensor(names: &[&str], is_transposed: bool) -> Target {
        Target::Tensor { names: names.iter().map(|name| name.to_string()).collect(), is_transposed }
    }

    #[test]
    fn paths_become_names() {
        use Family::{DeepseekV3, GptOss, Mixtral, Qwen2Moe};

        let of = |family, fields: &str, container: &str| {
            let mut fields: Vec<_> = fields.split('.').map(|name| (name, "Model")).collect();
            fields.last_mut().unwrap().1 = container;
            of(family, &fields)
        };
        assert_eq!(of(Mixtral, "lm_head.weight", "Linear"), tensor(&["lm_head.weight"], true));
        assert_eq!(
            of(Mixtral, "model.embed_tokens.weight", "Embedding"),
            tensor(&["model.embed_tokens.weight"], false)
        );
        assert_eq!(of(Mixtral, "model.norm.gamma", "RmsNorm"), tensor(&["model.norm.weight"], false));
        assert_eq!(of(Mixtral, "norm.beta", "LayerNorm"), tensor(&["norm.bias"], false));
        assert_eq!(of(GptOss, "self_attn.sinks", "Attention"), tensor(&["self_attn.sinks"], false));
        let in_block = |family, path: &[&str]| {
            let outer = [("layers", "Model"), ("0", "Vec"), ("mlp", "Layer")];
            let inner = path.iter().enumerate().map(|(i, name)| (*name, if i == 0 { "FSEPMoE" } else { "Other" }));
            super::tests::of(family, &outer.into_iter().chain(inner).collect::<Vec<_>>())
        };
        let names = ["layers.0.block_sparse_moe.gate.weight", "layers.0.mlp.gate.weight"];
        assert_eq!(in_block(Mixtral, &["router", "weight"]), tensor(&names, true));
        assert_eq!(in_block(GptOss, &["router", "weight"]), tensor(&["layers.0.mlp.router.weight"], true));
        assert_eq!(in_block(GptOss, &["router", "bias"]), tensor(&["layers.0.mlp.router.bias"], false));
        let bias = tensor(&["layers.0.mlp.gate.e_score_correction_bias"], false);
        assert_eq!(in_block(DeepseekV3, &["router", "expert_bias"]), bias);
        let shared = tensor(&["layers.0.mlp.shared_experts.up_proj.weight"], true);
        assert_eq!(in_block(DeepseekV3, &["shared_expert", "up_proj", "weight"]), shared);
        let gate = tensor(&["layers.0.mlp.shared_expert_gate.weight"], true);
        assert_eq!(in_block(Qwen2Moe, &["shared_expert", "gate", "weight"]), gate);
        let experts = Target::Experts { blocks: vec!["layers.0.mlp".into()] };
        assert_eq!(in_block(Qwen2Moe, &["experts", "weight"]), experts);
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("a.*", "a.bc", true),
            ("a.*", "b.a.c", false),
            ("*.c", "a.b.c", true),
            ("a.*.c", "a.b.d.c", true),
            ("a.*.c", "a.c", false),
            ("*b*d*", "abcde", true),
            ("*d*b*", "abcde", false),
            ("*", "", true),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
