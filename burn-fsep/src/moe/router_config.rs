use burn::{config::Config, tensor::FloatDType};

use crate::FsepError;

/// What a router makes of its logits.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum ScoreFunction {
    /// Probabilities over all experts.
    Softmax,
    /// A number between 0 and 1 for each expert by itself (DeepSeek-V3).
    Sigmoid,
}

/// What a group of experts counts for where tokens go to few groups.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2).
    Max,
    /// The sum of its two best experts (DeepSeek-V3).
    TopTwoSum,
}

/// Groups of neighbouring experts, of which a token chooses a few before it chooses experts (DeepSeek-V2, section 2.2.2).
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub struct RouterGroups {
    /// Equally large groups.
    pub num_groups: usize,
    /// Groups that a token's experts come from.
    pub group_topk: usize,
    /// What a group counts for.
    #[config(default = "GroupScore::Max")]
    pub score: GroupScore,
}

/// A bias of each expert that balances loads without an auxiliary loss (arXiv 2408.15664): it is added to the scores where
/// experts are chosen, and to nothing else. After each optimizer step it grows by `update_rate` for experts that got less than
/// the mean of the whole batch, and shrinks for those that got more; see
/// [`update_expert_biases`](crate::train::update_expert_biases).
#[derive(Config, Debug, Copy, PartialEq)]
pub struct ExpertBiasConfig {
    /// How far a bias moves in a step; 0 keeps it.
    #[config(default = 1e-3)]
    pub update_rate: f64,
    /// Whether the mean of a step's moves over experts is taken off them, so that the biases' mean stays.
    #[config(default = false)]
    pub zero_mean: bool,
}

/// How a [`TopKRouter`](super::TopKRouter) chooses and weighs experts. Options that Megatron-Core or transformers have carry their
/// names. The default is Mixtral's router.
#[derive(Config, Debug)]
pub struct TopKRouterConfig {
    /// What is made of the logits.
    #[config(default = "ScoreFunction::Softmax")]
    pub score_function: ScoreFunction,
    /// Softmax over all experts before the choice; otherwise over the chosen ones after it (GPT-OSS), which sum to 1 then.
    #[config(default = true)]
    pub pre_softmax: bool,
    /// Whether the scores of a token's experts are divided by their sum. `None`: unless there is only one, whose weight would
    /// always be 1, so that the router would get no gradient from the model's loss (Switch Transformer, eq. 2).
    #[config(default = "None")]
    pub norm_topk_prob: Option<bool>,
    /// Weights are multiplied by this, after they were normalised.
    #[config(default = 1.0)]
    pub topk_scaling_factor: f64,
    /// Groups of experts; without any a token chooses among all experts.
    #[config(default = "None")]
    pub groups: Option<RouterGroups>,
    /// A bias on the choice that balances loads.
    #[config(default = "None")]
    pub expert_bias: Option<ExpertBiasConfig>,
    /// Whether the logits have a bias, which is trained as the weight is (GPT-OSS).
    #[config(default = false)]
    pub logit_bias: bool,
    /// Type of the product of tokens and router (Megatron-Core's `moe_router_dtype`); `None` is that of the tokens. Scores are
    /// in single precision in any case.
    #[config(default = "None")]
    pub dtype: Option<FloatDType>,
    /// While the router is trained its input is multiplied by random numbers between `1 - eps` and `1 + eps` (Switch Transformer,
    /// section 2.2); 0 is off.
    #[config(default = 0.0)]
    pub input_jitter_eps: f64,
}

impl TopKRouterConfig {
    /// Whether a router of `num_experts` experts, of which each token gets `topk`, can be so.
    pub(super) fn check(&self, num_experts: usize, topk: usize) -> Result<(), FsepError> {
        let fail = |why: String| Err(FsepError::Config(format!("router: {why}")));
        if let Some(RouterGroups { num_groups, group_topk, score }) = self.groups {
            if num_groups == 0 || !num_experts.is_multiple_of(num_groups) {
                return fail(format!("num_groups = {num_groups} does not divide num_moe_experts = {num_experts}"));
            }
            let size = num_experts / num_groups;
            if !(1..=num_groups).contains(&group_topk) || group_topk * size < topk {
                return fail(format!(
                    "group_topk = {group_topk} of {num_groups} groups of {size} experts leaves no {topk} experts a token"
                ));
            }
            if score == GroupScore::TopTwoSum && size < 2 {
                return fail("groups of one expert have no two best ones: use GroupScore::Max".into());
            }
        }
        if self.score_function == ScoreFunction::Sigmoid && !self.pre_softmax {
            return fail("pre_softmax = false is of softmax, but score_function is sigmoid".into());
        }
        if !self.pre_softmax && self.norm_topk_prob == Some(false) {
            return fail(
                "norm_topk_prob = false needs pre_softmax: a softmax over the chosen experts is normalised".into(),
            );
        }
        let update_rate = self.expert_bias.map_or(0.0, |bias| bias.update_rate);
        for (name, value) in [
            ("topk_scaling_factor", self.topk_scaling_factor),
            ("input_jitter_eps", self.input_jitter_eps),
            ("expert_bias.update_rate", update_rate),
        ] {
            if !value.is_finite() || value < 0.0 {
                return fail(format!("{name} must be finite and not negative, got {value}"));
            }
        }
        Ok(())
    }
}
