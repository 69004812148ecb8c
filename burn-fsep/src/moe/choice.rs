//! From logits to the experts of each token and their weights.

use burn::{
    backend::Dispatch as AnyBackend,
    tensor::{
        DType, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData,
        activation::{sigmoid, softmax},
    },
};

use super::{GroupScore, RouterGroups, RouterOutput, ScoreFunction, TopKRouterConfig};
use crate::ops::FsepDeviceOps;

/// The scores of all experts; for a softmax after the choice what it would be before it. `[T, E] -> [T, E]`
pub(super) fn scores(logits: &Tensor<2>, config: &TopKRouterConfig) -> Tensor<2> {
    match config.score_function {
        ScoreFunction::Softmax => softmax(logits.clone(), 1),
        ScoreFunction::Sigmoid => sigmoid(logits.clone()),
    }
}

/// The `K` best experts of each token. `logits`: `[T, E]`; `bias` on the choice: `[E]`, without autodiff; `dtype`: that of the
/// weights.
pub(super) fn top_k(
    logits: Tensor<2>,
    config: &TopKRouterConfig,
    bias: Option<Tensor<1>>,
    topk: usize,
    dtype: DType,
) -> RouterOutput {
    let num_experts = logits.dims()[1];
    let scores = scores(&logits, config);
    let is_sum_of_scores = matches!(config.groups, Some(RouterGroups { score: GroupScore::TopTwoSum, .. }));
    // By logits wherever that is the same order: small probabilities may all be 0, and sigmoids all 1.
    let ranked = match bias {
        Some(bias) => scores.clone().inner() + bias.unsqueeze(),
        None if is_sum_of_scores => scores.clone().inner(),
        None => logits.clone().inner(),
    };
    let ranked = match config.groups {
        Some(groups) => only_best_groups(ranked, groups),
        None => ranked,
    };
    let chosen = best(ranked, topk);
    // A logit that is no number, or infinite, gives scores that are no numbers, and any expert: marked here, on the device, and
    // noticed where the counts are read anyway. One sigmoid says nothing of the others, nor does a softmax of the chosen ones:
    // what is no number is chosen last.
    let sum_of_scores = scores.clone().inner().sum_dim(1);
    let mut output = weigh(logits, scores, chosen, config, dtype);
    let probs = output.probs.clone().inner();
    let without_scores = (probs + (sum_of_scores * 0.0).cast(dtype)).is_nan();
    output.experts = output.experts.mask_fill(without_scores, num_experts as i64);
    output
}

/// The experts of a choice with their weights. `logits`, `scores`: `[T, E]`, `chosen`: `[T, K]`
pub(super) fn weigh(
    logits: Tensor<2>,
    scores: Tensor<2>,
    chosen: Tensor<2, Int>,
    config: &TopKRouterConfig,
    dtype: DType,
) -> RouterOutput {
    /// transformers' (DeepSeek-V3), so that scores that are all 0 give weights that are 0.
    const SMALLEST_SUM: f64 = 1e-20;
    let topk = chosen.dims()[1];
    let chosen_of = |all: &Tensor<2>| all.clone().gather(1, chosen.clone());
    let mut probs = if config.pre_softmax { chosen_of(&scores) } else { softmax(chosen_of(&logits), 1) };
    if config.pre_softmax && config.norm_topk_prob.unwrap_or(topk > 1) {
        probs = probs.clone() / (probs.sum_dim(1) + SMALLEST_SUM);
    }
    if config.topk_scaling_factor != 1.0 {
        probs = probs * config.topk_scaling_factor;
    }
    // Sigmoids whose sum is free could be lowered without any balance.
    let shares = match config.score_function {
        ScoreFunction::Softmax => scores,
        ScoreFunction::Sigmoid => scores.clone() / (scores.sum_dim(1) + SMALLEST_SUM),
    };
    RouterOutput::new(probs.cast(dtype), chosen).with_scores(shares).with_logits(logits)
}

/// Minus infinity for all experts outside of the best groups. `[T, E] -> [T, E]`
fn only_best_groups(ranked: Tensor<2>, groups: RouterGroups) -> Tensor<2> {
    let RouterGroups { num_groups, group_topk, score } = groups;
    let [tokens, num_experts] = ranked.dims();
    let size = num_experts / num_groups;
    let by_group = ranked.clone().reshape([tokens * num_groups, size]);
    let group_scores = match score {
        GroupScore::Max => by_group.max_dim(1),
        GroupScore::TopTwoSum => {
            let two_best = best(by_group.clone(), 2);
            by_group.gather(1, two_best).sum_dim(1)
        }
    };
    let chosen = best(group_scores.reshape([tokens, num_groups]), group_topk);
    let zeros = Tensor::<2>::zeros([tokens, num_groups], (&ranked.device(), DType::F32));
    let ones = Tensor::<2>::ones([tokens, group_topk], (&ranked.device(), DType::F32));
    let is_chosen = zeros.scatter(1, chosen, ones, IndexingUpdateOp::Add);
    let group_of_expert: Vec<i32> = (0..num_experts).map(|expert| (expert / size) as i32).collect();
    let group_of_expert = TensorData::new(group_of_expert, [num_experts]);
    let is_chosen = is_chosen.select(1, Tensor::from_data(group_of_expert, &ranked.device()));
    ranked.mask_fill(is_chosen.lower_elem(0.5), f64::NEG_INFINITY)
}

/// Indices of the `topk` largest numbers of each row, the largest first, of equal ones the lower index. `[R, W] -> [R, topk]`
fn best(numbers: Tensor<2>, topk: usize) -> Tensor<2, Int> {
    let numbers = numbers.cast(FloatDType::F32).into_dispatch();
    Tensor::from_dispatch(<AnyBackend as FsepDeviceOps>::fsep_top_k(numbers, topk))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn routed(config: &TopKRouterConfig, bias: Option<&[f32]>, logits: &[f32], topk: usize) -> (Vec<f32>, Vec<i64>) {
        let device = Device::flex();
        let logits = Tensor::<2>::from_data(TensorData::new(logits.to_vec(), [1, logits.len()]), &device);
        let bias = bias.map(|bias| Tensor::from_data(TensorData::new(bias.to_vec(), [bias.len()]), &device));
        let output = top_k(logits, config, bias, topk, DType::F32);
        (output.probs.into_data().iter().collect(), output.experts.into_data().iter().collect())
    }

    fn assert_routed(config: &TopKRouterConfig, bias: Option<&[f32]>, logits: &[f32], expected: &[(i64, f32)]) {
        let (probs, experts) = routed(config, bias, logits, expected.len());
        assert_eq!(experts, expected.iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), "{config:?}");
        for (prob, (_, expected)) in probs.iter().zip(expected) {
            assert!((prob - expected).abs() <= 1e-6 * expected.max(1e-3), "{config:?}: {probs:?}, not {expected}");
        }
    }

    /// Probabilities 1/2, 1/4, 1/8, 1/8.
    #[test]
    fn weights_are_normalised_as_the_option_says() {
        let logits = [4.0f32.ln(), 2.0f32.ln(), 0.0, 0.0];
        let config = TopKRouterConfig::new;
        let (third, two_thirds) = (1.0 / 3.0, 2.0 / 3.0);
        assert_routed(&config(), None, &logits, &[(0, two_thirds), (1, third)]);
        assert_routed(&config(), None, &logits, &[(0, 0.5)]);
        for (normalised, expected) in [(true, [two_thirds, third]), (false, [0.5, 0.25])] {
            let config = config().with_norm_topk_prob(Some(normalised));
            assert_routed(&config, None, &logits, &[(0, expected[0]), (1, expected[1])]);
        }
        assert_routed(&config().with_norm_topk_prob(Some(true)), None, &logits, &[(0, 1.0)]);
        let after = config().with_pre_softmax(false);
        assert_routed(&after, None, &logits, &[(0, two_thirds), (1, third)]);
        assert_routed(&after, None, &logits, &[(0, 1.0)]);
        let scaled = config().with_norm_topk_prob(Some(false)).with_topk_scaling_factor(16.0);
        assert_routed(&scaled, None, &logits, &[(0, 8.0), (1, 4.0)]);
    }

    /// All probabilities but the first are 0, and all sigmoids 1.
    #[test]
    fn scores_that_underflow_leave_a_choice() {
        for config in [TopKRouterConfig::new(), TopKRouterConfig::new().with_pre_softmax(false)] {
            assert_routed(&config, None, &[200.0, 0.0, -1.0, -2.0], &[(0, 1.0), (1, 0.0)]);
            assert_routed(&config, None, &[-2.0, -1.0, 0.0, 200.0], &[(3, 1.0), (2, 0.0), (1, 0.0)]);
        }
        let sigmoid = TopKRouterConfig::new().with_score_function(ScoreFunction::Sigmoid);
        assert_routed(&sigmoid, None, &[60.0, 70.0, 80.0, 50.0], &[(2, 0.5), (1, 0.5)]);
    }

    #[test]
    fn logits_without_scores_have_no_expert() {
        let sigmoid = TopKRouterConfig::new().with_score_function(ScoreFunction::Sigmoid);
        let softmax_of_chosen = TopKRouterConfig::new().with_pre_softmax(false);
        for bad in [f32::NAN, f32::INFINITY] {
            for config in [TopKRouterConfig::new(), softmax_of_chosen.clone()] {
                assert_eq!(routed(&config, None, &[0.0, bad, 1.0], 2).1, [3, 3], "{bad}, {config:?}");
            }
        }
        assert_eq!(routed(&sigmoid, None, &[0.0, f32::NAN, 1.0], 2).1, [3, 3]);
        assert_eq!(routed(&TopKRouterConfig::new(), None, &[f32::NEG_INFINITY; 3], 2).1, [3, 3]);
        for config in [TopKRouterConfig::new(), softmax_of_chosen, sigmoid] {
            assert_eq!(routed(&config, None, &[0.0, f32::NEG_INFINITY, 1.0], 2).1, [2, 0]);
        }
    }

    #[test]
    fn of_equal_scores_the_lower_index_is_better() {
        let groups = RouterGroups::new(4, 2).with_score(GroupScore::TopTwoSum);
        for config in [
            TopKRouterConfig::new(),
            TopKRouterConfig::new().with_score_function(ScoreFunction::Sigmoid),
            TopKRouterConfig::new().with_groups(Some(groups)),
        ] {
            for zero in [0.0, -0.0] {
                assert_eq!(routed(&config, None, &[0.0, zero, 0.0, zero, 0.0, 0.0, 0.0, 0.0], 3).1, [0, 1, 2]);
            }
            assert_eq!(routed(&config, Some(&[0.5; 8]), &[0.0; 8], 3).1, [0, 1, 2]);
        }
        assert_eq!(routed(&TopKRouterConfig::new(), None, &[1.0, 2.0, 1.0, 2.0, 1.0], 3).1, [1, 3, 0]);
    }

    /// DeepSeek-V3 (transformers #45440): with 0 in place of minus infinity experts 4 to 7 would win.
    #[test]
    fn experts_outside_of_the_best_groups_are_never_chosen() {
        let config = TopKRouterConfig::new()
            .with_score_function(ScoreFunction::Sigmoid)
            .with_groups(Some(RouterGroups::new(4, 2).with_score(GroupScore::TopTwoSum)))
            .with_topk_scaling_factor(2.5);
        let logits = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5];
        let expected = [(0, 0.721518), (1, 0.669728), (2, 0.598857), (3, 0.509897)];
        assert_routed(&config, Some(&[-1.0; 8]), &logits, &expected);
    }

    /// The best group by its two best experts is not that of the best expert.
    #[test]
    fn groups_count_for_their_best_or_for_their_two_best() {
        let logits = [3.0, -9.0, 2.0, 2.0];
        let of = |score| {
            let groups = RouterGroups::new(2, 1).with_score(score);
            let config = TopKRouterConfig::new().with_score_function(ScoreFunction::Sigmoid).with_groups(Some(groups));
            routed(&config, None, &logits, 2).1
        };
        assert_eq!(of(GroupScore::Max), [0, 1]);
        assert_eq!(of(GroupScore::TopTwoSum), [2, 3]);
    }

    /// flashinfer PR 3875: a weight that is what is left of score plus bias minus bias would be 0 here.
    #[test]
    fn weights_do_not_have_the_bias() {
        let config = TopKRouterConfig::new().with_score_function(ScoreFunction::Sigmoid);
        let logits = [(1e-8f32).ln(), 0.0, (2e-8f32).ln()];
        let (one_third, two_thirds) = (1.0 / 3.0, 2.0 / 3.0);
        assert_routed(&config, Some(&[12.0, 0.0, 12.0]), &logits, &[(0, one_third), (2, two_thirds)][..]);
    }

    /// Megatron-LM 1545: with sigmoids as they are, the loss falls with their sum, without any balance.
    #[test]
    fn shares_of_sigmoids_sum_to_one() {
        let device = Device::flex();
        let logits = Tensor::<2>::from_data(TensorData::new(vec![-3.0f32, -9.0, 1.0, 0.0], [1, 4]), &device);
        let config = TopKRouterConfig::new().with_score_function(ScoreFunction::Sigmoid);
        let sum = top_k(logits, &config, None, 2, DType::F32).scores.unwrap().sum().into_scalar::<f32>();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }
}
