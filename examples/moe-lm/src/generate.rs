use burn::tensor::{Device, Int, Tensor, TensorData, activation::softmax};
use burn_fsep::planner::SplitMix64;

use crate::model::MoeLm;

/// Continues `prompt` by `count` bytes. All ranks must call it with the same arguments: they run the layers together,
/// and draw the same bytes.
pub(crate) fn generate(
    model: &MoeLm,
    prompt: &[u8],
    count: usize,
    context: usize,
    seed: u64,
    device: &Device,
) -> Vec<u8> {
    const TEMPERATURE: f32 = 0.7;
    let mut rng = SplitMix64::new(seed);
    let mut bytes = prompt.to_vec();
    for _ in 0..count {
        let window = &bytes[bytes.len().saturating_sub(context)..];
        let ids: Vec<i32> = window.iter().map(|&b| i32::from(b)).collect();
        let len = ids.len();
        let input = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, len]), device);
        let (logits, _) = model.forward(input);
        let [_, _, values] = logits.dims();
        let last = logits.slice([0..1, len - 1..len, 0..values]).reshape([1, values]) / TEMPERATURE;
        let probs = softmax(last, 1).into_data();
        let mut rest = rng.unit() as f32;
        let chosen = probs.iter::<f32>().position(|p| {
            rest -= p;
            rest <= 0.0
        });
        bytes.push(chosen.unwrap_or(usize::from(b' ')) as u8);
    }
    bytes.split_off(prompt.len())
}
