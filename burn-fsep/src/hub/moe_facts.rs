use super::{Family, HubError, keys::Keys};

/// What `config.json` says of experts and routers.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct MoeFacts {
    /// Experts `E`.
    pub num_experts: usize,
    /// Experts per token `K`.
    pub num_experts_per_tok: usize,
    /// Intermediate size `F` of an expert.
    pub intermediate_size: usize,
    /// Intermediate size of the expert, or of all experts together, that every token gets.
    pub shared_expert_intermediate_size: Option<usize>,
    /// Whether a gate weighs it (Qwen2-MoE).
    pub shared_expert_gate: bool,
    /// Whether the weights of a token's experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor of the weights.
    pub routed_scaling_factor: f64,
    /// What is made of the logits.
    pub scoring: Scoring,
    /// Groups of experts, and those of them that a token's experts come from; `None`: a token chooses among all.
    pub groups: Option<[usize; 2]>,
    /// Weight of the load-balancing loss, as transformers computes it: over all layers together. 0 for none.
    pub router_aux_loss_coef: f64,
    /// DeepSeek-V2's own: weight of each layer's loss of each sequence. 0 for none.
    pub seq_aux_loss_alpha: f64,
    /// Noise on the router's input while it is trained.
    pub router_jitter_noise: f64,
    /// Bounds of gate and up, and the factor in the gate's sigmoid (GPT-OSS).
    pub clamped_swiglu: Option<ClampedSwiGlu>,
}

/// What is made of a router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scoring {
    /// Probabilities over all experts.
    Softmax,
    /// A number for each expert by itself, to which a bias is added where experts are chosen (DeepSeek-V3).
    Sigmoid,
    /// Probabilities over the chosen experts, whose logits have a bias (GPT-OSS).
    SoftmaxOfChosen,
}

/// The nonlinearity of GPT-OSS's experts: `gate * sigmoid(alpha * gate) * (up + 1)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClampedSwiGlu {
    /// The factor in the sigmoid.
    pub alpha: f64,
    /// The gate is not above it, `up` within it.
    pub limit: f64,
}

impl MoeFacts {
    pub(super) fn read(keys: Keys<'_>, family: Family) -> Result<Self, HubError> {
        let num_experts = match family {
            Family::Mixtral | Family::GptOss => keys.size_of_either("num_local_experts", "num_experts")?,
            Family::DeepseekV2 | Family::DeepseekV3 => keys.size_of_either("n_routed_experts", "num_local_experts")?,
            _ => keys.size_of_either("num_experts", "num_local_experts")?,
        };
        let num_experts_per_tok = keys.size("num_experts_per_tok")?;
        if num_experts_per_tok > num_experts {
            return Err(keys.error("num_experts_per_tok", format!("is more than the {num_experts} experts")));
        }
        let intermediate_size = match family {
            Family::Mixtral | Family::Olmoe | Family::GptOss => keys.size("intermediate_size")?,
            _ => keys.size("moe_intermediate_size")?,
        };
        let shared = match family {
            Family::Qwen2Moe => Some(keys.size("shared_expert_intermediate_size")?),
            Family::DeepseekV2 | Family::DeepseekV3 => {
                let shared = keys.find_usize("n_shared_experts")?.filter(|&shared| shared > 0);
                let size = |shared: usize| {
                    shared
                        .checked_mul(intermediate_size)
                        .ok_or_else(|| keys.error("n_shared_experts", "is more than any machine can hold"))
                };
                shared.map(size).transpose()?
            }
            _ => None,
        };
        if family == Family::DeepseekV2 && keys.bool_or("mlp_bias", false)? {
            return Err(keys.error("mlp_bias", "is true: experts of this family have no biases"));
        }
        let scoring = scoring(keys, family)?;
        let norm_topk_prob = match family {
            Family::Mixtral | Family::GptOss => true,
            // transformers 5.24 does not normalise, whatever the key says.
            Family::DeepseekV2 => false,
            Family::DeepseekV3 => keys.bool_or("norm_topk_prob", true)?,
            _ => keys.bool_or("norm_topk_prob", false)?,
        };
        let aux = match family {
            Family::DeepseekV2 | Family::DeepseekV3 => 0.0,
            Family::Olmoe => keys.f64_or("router_aux_loss_coef", 0.01)?,
            _ => keys.f64_or("router_aux_loss_coef", 0.001)?,
        };
        let jitter = if family == Family::Mixtral { keys.f64_or("router_jitter_noise", 0.0)? } else { 0.0 };
        let clamped =
            ClampedSwiGlu { alpha: keys.f64_or("swiglu_alpha", 1.702)?, limit: keys.f64_or("swiglu_limit", 7.0)? };
        let scale = match family {
            Family::DeepseekV2 => keys.f64_or("routed_scaling_factor", 1.0)?,
            Family::DeepseekV3 => keys.f64_or("routed_scaling_factor", 2.5)?,
            _ => 1.0,
        };
        let alpha = if family == Family::DeepseekV2 { keys.f64_or("aux_loss_alpha", 0.0)? } else { 0.0 };
        Ok(Self {
            num_experts,
            num_experts_per_tok,
            intermediate_size,
            shared_expert_intermediate_size: shared,
            shared_expert_gate: family == Family::Qwen2Moe,
            norm_topk_prob,
            routed_scaling_factor: scale,
            scoring,
            groups: groups(keys, family, num_experts)?,
            router_aux_loss_coef: aux,
            seq_aux_loss_alpha: alpha,
            router_jitter_noise: jitter,
            clamped_swiglu: (family == Family::GptOss).then_some(clamped),
        })
    }

    /// Whether each layer has experts.
    pub(super) fn sparse_layers(&self, keys: Keys<'_>, family: Family, layers: usize) -> Result<Vec<bool>, HubError> {
        if family.is_qwen() {
            let step = keys.find_usize("decoder_sparse_step")?.unwrap_or(1);
            if step == 0 {
                return Err(keys.error("decoder_sparse_step", "is 0"));
            }
            let dense = keys.usizes("mlp_only_layers")?;
            return Ok((0..layers).map(|layer| !dense.contains(&layer) && (layer + 1).is_multiple_of(step)).collect());
        }
        if family.is_deepseek() {
            if keys.find_usize("moe_layer_freq")?.is_some_and(|every| every != 1) {
                return Err(keys.error("moe_layer_freq", "is not 1: transformers gives all layers experts"));
            }
            let default = if family == Family::DeepseekV3 { 3 } else { 0 };
            let dense = keys.find_usize("first_k_dense_replace")?.unwrap_or(default);
            return Ok((0..layers).map(|layer| layer >= dense).collect());
        }
        Ok(vec![true; layers])
    }
}

fn scoring(keys: Keys<'_>, family: Family) -> Result<Scoring, HubError> {
    let (scoring, name) = match family {
        Family::DeepseekV3 => (Scoring::Sigmoid, "sigmoid"),
        Family::GptOss => (Scoring::SoftmaxOfChosen, "softmax"),
        _ => (Scoring::Softmax, "softmax"),
    };
    match keys.find_str("scoring_func")? {
        Some(other) if other != name => {
            Err(keys.error("scoring_func", format!("is `{other}`, but routers of this family have {name}")))
        }
        _ => Ok(scoring),
    }
}

/// Groups, and how many of them a token goes to.
fn groups(keys: Keys<'_>, family: Family, experts: usize) -> Result<Option<[usize; 2]>, HubError> {
    match (family, keys.find_str("topk_method")?) {
        (Family::DeepseekV2, None | Some("greedy")) => return Ok(None),
        (Family::DeepseekV2, Some("group_limited_greedy")) | (Family::DeepseekV3, None | Some("noaux_tc")) => {}
        (Family::DeepseekV2 | Family::DeepseekV3, Some(other)) => {
            return Err(keys.error("topk_method", format!("is `{other}`, which this family's routers do not have")));
        }
        _ => return Ok(None),
    }
    let defaults = if family == Family::DeepseekV3 && !keys.object.contains_key("n_group") { [8, 4] } else { [1, 1] };
    let groups = keys.find_usize("n_group")?.unwrap_or(defaults[0]);
    let chosen = keys.find_usize("topk_group")?.unwrap_or(defaults[1]);
    if groups == 0 || !experts.is_multiple_of(groups) {
        return Err(keys.error("n_group", format!("is {groups}, which does not divide {experts} experts")));
    }
    if !(1..=groups).contains(&chosen) {
        return Err(keys.error("topk_group", format!("is {chosen} of {groups} groups")));
    }
    // All groups are no choice.
    Ok((groups > chosen).then_some([groups, chosen]))
}
