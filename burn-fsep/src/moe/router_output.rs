use burn::tensor::{Int, Tensor};

/// What a router says of `T` tokens: any router, also one of your own. See
/// [`FsepExperts::forward`](super::FsepExperts::forward).
#[derive(Debug, Clone)]
pub struct RouterOutput {
    /// Weights of the chosen experts: their outputs are summed with these. `[T, K]`
    pub probs: Tensor<2>,
    /// The chosen experts; `E` is none, which says that the router found no expert for the token (its logits are no
    /// numbers). `[T, K]`
    pub experts: Tensor<2, Int>,
    /// Scores of all experts, in single precision, for the load-balancing loss: each row sums to 1. `[T, E]`
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

    /// Adds the scores of all experts, `[T, E]`, in single precision, each row with the sum 1: the load-balancing loss needs them.
    pub fn with_scores(mut self, scores: Tensor<2>) -> Self {
        self.scores = Some(scores);
        self
    }

    /// Adds the logits of all experts, `[T, E]`, in single precision: the z-loss needs them.
    pub fn with_logits(mut self, logits: Tensor<2>) -> Self {
        self.logits = Some(logits);
        self
    }
}
