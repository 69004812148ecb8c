use burn::tensor::FloatDType;

use super::{ClampedSwiGlu, Family, HiddenAct, ModelConfig, Scoring};
use crate::{
    FSEPMoEConfig,
    moe::{
        ExpertActivation, ExpertBiasConfig, GroupScore, LoadBalancing, RouterGroups, ScoreFunction, SharedExpertConfig,
        TopKRouterConfig,
    },
    shard::ExpertShape,
};

impl ModelConfig {
    /// The layer that computes what the family's MoE block in transformers 5.24 does.
    ///
    /// Its load-balancing loss is off, but for DeepSeek-V2's own of each sequence: transformers' loss is one of all layers
    /// together, [`pooled_load_balancing_loss`](crate::moe::pooled_load_balancing_loss) weighed by
    /// [`router_aux_loss_coef`](super::MoeFacts::router_aux_loss_coef). DeepSeek-V3's bias on the choice stays as it is (an update
    /// rate of 0, as at the end of its own training): change that for training that is to balance by it.
    pub fn moe_config(&self) -> FSEPMoEConfig {
        let (moe, bias) = (&self.moe, self.family == Family::GptOss);
        let mut router = TopKRouterConfig::new()
            .with_norm_topk_prob(Some(moe.norm_topk_prob))
            .with_topk_scaling_factor(moe.routed_scaling_factor)
            .with_input_jitter_eps(moe.router_jitter_noise)
            .with_logit_bias(bias);
        match moe.scoring {
            Scoring::Softmax => {}
            Scoring::Sigmoid => {
                router.score_function = ScoreFunction::Sigmoid;
                router.expert_bias = Some(ExpertBiasConfig::new().with_update_rate(0.0));
            }
            Scoring::SoftmaxOfChosen => router.pre_softmax = false,
        }
        if self.family.is_deepseek() {
            router.dtype = Some(FloatDType::F32);
        }
        router.groups = moe.groups.map(|[num_groups, group_topk]| {
            let score = if moe.scoring == Scoring::Sigmoid { GroupScore::TopTwoSum } else { GroupScore::Max };
            RouterGroups::new(num_groups, group_topk).with_score(score)
        });
        let shared = moe.shared_expert_intermediate_size;
        let shared = shared.map(|size| SharedExpertConfig::new(size).with_gate(moe.shared_expert_gate));
        let activation = match (moe.clamped_swiglu, self.hidden_act) {
            (Some(ClampedSwiGlu { alpha, limit }), _) => ExpertActivation::ClampedSwiGlu { alpha, limit },
            (None, HiddenAct::Silu) => ExpertActivation::SwiGlu,
            (None, HiddenAct::Gelu) => ExpertActivation::Geglu,
        };
        let balancing = if moe.seq_aux_loss_alpha > 0.0 { LoadBalancing::Sequence } else { LoadBalancing::GlobalBatch };
        FSEPMoEConfig::new(self.hidden_size, moe.intermediate_size, moe.num_experts)
            .with_moe_router_topk(moe.num_experts_per_tok)
            .with_router(router)
            .with_activation(activation)
            .with_add_bias_linear(bias)
            .with_shared_expert(shared)
            .with_moe_aux_loss_coeff(moe.seq_aux_loss_alpha)
            .with_moe_router_load_balancing(balancing)
    }

    /// The sizes of an expert.
    pub(super) fn expert_shape(&self) -> ExpertShape {
        let bias = self.family == Family::GptOss;
        ExpertShape { hidden: self.hidden_size, ffn: self.moe.intermediate_size, gated: true, bias }
    }
}
