use burn::tensor::{DType, Int, Tensor, activation::log_softmax};

/// The sum over real targets of minus the log probability of each next token. `logits`: `[B, L, V]`, `ids`: `[B, L]`;
/// `real`: `[B, L]`, 1 for real tokens and 0 for padding, without which all are real. `[1]`
pub fn next_token_loss(logits: Tensor<3>, ids: Tensor<2, Int>, real: Option<Tensor<2>>) -> Tensor<1> {
    let [batch, length, vocabulary] = logits.dims();
    let rows = batch * (length - 1);
    let targets = ids.narrow(1, 1, length - 1).reshape([rows, 1]);
    let logits = logits.narrow(1, 0, length - 1).reshape([rows, vocabulary]).cast(DType::F32);
    let losses = -log_softmax(logits, 1).gather(1, targets);
    match real {
        Some(real) => (losses * real.narrow(1, 1, length - 1).reshape([rows, 1])).sum(),
        None => losses.sum(),
    }
}
