//! From logits to the experts of each token and their weights.

use burn::{
    backend::Dispatch as AnyBackend,
    tensor::{
        DType, FloatDType, Int, Tensor,
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
    // noticed where the counts are read anyway. One sigmoid says nothing of the others.
    let without_scores = match config.score_function {
        ScoreFunction::Softmax => None,
        ScoreFunction::Sigmoid => Some(scores.clone().inner().sum_dim(1).is_nan().expand([logits.dims()[0], topk])),
    };
    let mut output = weigh(logits, scores, chosen, config, dtype);
    let without_scores = without_scores.unwrap_or_else(|| output.probs.clone().inner().is_nan());
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
    let [zeros, ones] =
        [[tokens, num_groups], [tokens, group_topk]].map(|dims| Tensor::<2>::zeros(dims, &ranked.device()));
    let is_chosen = zeros.scatter(1, chosen, ones + 1.0, burn::tensor::IndexingUpdateOp::Add).greater_elem(0.5);
    let is_chosen = is_chosen.reshape([tokens, num_groups, 1]).expand([tokens, num_groups, size]);
    ranked.mask_fill(is_chosen.reshape([tokens, num_experts]).bool_not(), f64::NEG_INFINITY)
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

    fn routed(logits: &[f32], topk: usize) -> (Vec<f32>, Vec<i64>) {
        let logits = Tensor::<2>::from_data(TensorData::new(logits.to_vec(), [1, logits.len()]), &Device::flex());
        let output = top_k(logits, &TopKRouterConfig::new(), None, topk, DType::F32);
        (output.probs.into_data().iter().collect(), output.experts.into_data().iter().collect())
    }

    /// Probabilities 1/2, 1/4, 1/8, 1/8.
    #[test]
    fn chosen_probabilities_sum_to_one_unless_there_is_only_one() {
        let logits = [4.0f32.ln(), 2.0f32.ln(), 0.0, 0.0];
        for (topk, expected) in [(1, vec![0.5]), (2, vec![2.0 / 3.0, 1.0 / 3.0])] {
            let (probs, experts) = routed(&logits, topk);
            assert_eq!(experts, (0..topk as i64).collect::<Vec<_>>());
            assert!(probs.iter().zip(&expected).all(|(p, e): (_, &f32)| (p - e).abs() < 1e-6), "{probs:?}");
        }
    }

    /// All probabilities but the first are 0.
    #[test]
    fn probabilities_that_underflow_leave_a_choice() {
        assert_eq!(routed(&[200.0, 0.0, -1.0, -2.0], 2), (vec![1.0, 0.0], vec![0, 1]));
        assert_eq!(routed(&[-2.0, -1.0, 0.0, 200.0], 3), (vec![1.0, 0.0, 0.0], vec![3, 2, 1]));
    }

    #[test]
    fn logits_without_probabilities_have_no_expert() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(routed(&[0.0, bad, 1.0], 2).1, [3, 3], "{bad}");
        }
        assert_eq!(routed(&[f32::NEG_INFINITY; 3], 2).1, [3, 3]);
        assert_eq!(routed(&[0.0, f32::NEG_INFINITY, 1.0], 2).1, [2, 0]);
    }
}
