use burn::tensor::{DType, Int, Tensor, activation::log_softmax};

use super::positions::is_fused;

/// The sum over tokens of minus the log probability of each next one. `logits`: `[T, V]`; `targets`: `[T]`, the next tokens;
/// `weights`: `[T]`, 1 for tokens that have one and 0 for others, in single precision. `[1]`
///
/// The last tokens of texts have weight 0, as in transformers: leaving their rows out would copy all logits.
pub fn next_token_loss(logits: Tensor<2>, targets: Tensor<1, Int>, weights: Tensor<1>) -> Tensor<1> {
    if is_fused(&logits.device()) {
        #[cfg(feature = "libtorch")]
        return super::fused::next_token_loss(logits, targets, weights);
    }
    let tokens = logits.dims()[0];
    let log_probabilities = log_softmax(logits.cast(DType::F32), 1).gather(1, targets.reshape([tokens, 1]));
    -(log_probabilities.reshape([tokens]) * weights).sum()
}
