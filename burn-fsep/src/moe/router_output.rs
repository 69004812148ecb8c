use burn::tensor::{DType, Int, Tensor, activation::softmax};

/// What a router says of `T` tokens: any router, also one of your own. See
/// [`FsepExperts::forward`](super::FsepExperts::forward).
#[derive(Debug, Clone)]
pub struct RouterOutput {
    /// Weights of the chosen experts: their outputs are summed with these. `[T, K]`
    pub probs: Tensor<2>,
    /// The chosen experts; `E` is none, which says that the router found no expert for the token (its logits are no
    /// numbers). `[T, K]`
    pub experts: Tensor<2, Int>,
    /// Probabilities of all experts, in single precision, for the load-balancing loss. `[T, E]`
    pub scores: Option<Tensor<2>>,
    /// The logits of all experts, in single precision, for the z-loss. `[T, E]`
    pub logits: Option<Tensor<2>>,
}

impl RouterOutput {
    /// A routing of `T` tokens to `K` experts each: `probs` and `experts` are `[T, K]`. The auxiliary losses need more:
    /// [`with_scores`](Self::with_scores) and [`with_logits`](Self::with_logits).
    pub fn new(probs: Tensor<2>, experts: Tensor<2, Int>) -> Self {
        Self { probs, experts, scores: None, logits: None }
    }

    /// Adds the probabilities of all experts, `[T, E]`, in single precision: the load-balancing loss needs them.
    pub fn with_scores(mut self, scores: Tensor<2>) -> Self {
        self.scores = Some(scores);
        self
    }

    /// Adds the logits of all experts, `[T, E]`, in single precision: the z-loss needs them.
    pub fn with_logits(mut self, logits: Tensor<2>) -> Self {
        self.logits = Some(logits);
        self
    }

    /// The `K` largest logits of each token: chosen by logits, as small probabilities may all be 0. `logits`: `[T, E]`;
    /// `dtype`: the input's.
    pub(super) fn top_k(logits: Tensor<2>, topk: usize, dtype: DType) -> Self {
        let num_experts = logits.dims()[1];
        let (_, chosen) = logits.clone().detach().topk_with_indices(topk, 1);
        let mut output = Self::of_choice(logits, chosen, dtype);
        // Logits that are not finite give probabilities that are no numbers, and any expert: marked here, on the device, and
        // noticed where the counts are read anyway.
        output.experts = output.experts.mask_fill(output.probs.clone().inner().is_nan(), num_experts as i64);
        output
    }

    /// The experts of a choice, which is on the device of the logits. `logits`: `[T, E]`, `chosen`: `[T, K]`
    pub(super) fn of_choice(logits: Tensor<2>, chosen: Tensor<2, Int>, dtype: DType) -> Self {
        let topk = chosen.dims()[1];
        let scores = softmax(logits.clone(), 1);
        let probs = scores.clone().gather(1, chosen.clone());
        // Of an only choice the share is always 1, from which the router would learn nothing.
        let probs = if topk == 1 { probs } else { probs.clone() / probs.sum_dim(1) };
        Self::new(probs.cast(dtype), chosen.inner()).with_scores(scores).with_logits(logits)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn routed(logits: &[f32], topk: usize) -> (Vec<f32>, Vec<i64>) {
        let logits = Tensor::<2>::from_data(TensorData::new(logits.to_vec(), [1, logits.len()]), &Device::flex());
        let output = RouterOutput::top_k(logits, topk, DType::F32);
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
