use std::ops::Range;

use burn_fsep_planner::SplitMix64;
use serde::{Deserialize, Serialize};

/// The sizes of one expert, and how its parameters lie in its flat vector of length `P`.
///
/// The vector holds `gate [F, D]` if the expert is gated, `up [F, D]`, `down [D, F]`, row-major and in this order: the
/// convention of `[out, in]` weights. Gate and up together are one `[2F, D]` matrix. If it has biases, those of gate and up, `[2F]`
/// or `[F]`, and of down, `[D]`, follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExpertShape {
    /// Hidden size `D`.
    pub hidden: usize,
    /// Intermediate size `F`.
    pub ffn: usize,
    /// Whether there is a gate.
    #[serde(default = "gated")]
    pub gated: bool,
    /// Whether both projections have biases.
    #[serde(default)]
    pub bias: bool,
}

/// What experts are of which it is not said: those of the first checkpoints.
fn gated() -> bool {
    true
}

impl ExpertShape {
    /// A gated expert without biases.
    pub fn new(hidden: usize, ffn: usize) -> Self {
        Self { hidden, ffn, gated: true, bias: false }
    }

    /// Width of the first projection's output: `2F` with a gate, `F` without.
    pub fn first_width(&self) -> usize {
        if self.gated { 2 * self.ffn } else { self.ffn }
    }

    /// Parameters `P` of one expert.
    pub fn num_params(&self) -> usize {
        let biases = if self.bias { self.first_width() + self.hidden } else { 0 };
        self.bias_start() + biases
    }

    /// Parameters of the first projection's matrix: where `down` starts.
    pub fn gate_up_len(&self) -> usize {
        self.first_width() * self.hidden
    }

    /// Parameters of both matrices: where the biases start.
    pub fn bias_start(&self) -> usize {
        self.gate_up_len() + self.hidden * self.ffn
    }

    /// Shard length `S = ceil(P / N)`; the last shards are padded with zeros.
    pub fn shard_len(&self, world_size: usize) -> usize {
        self.num_params().div_ceil(world_size)
    }
}

/// Initial parameters of one expert, those at these positions of its flat vector; biases are zeros, and so is what is beyond `P`,
/// as shards are padded.
/// Shape `[positions]`.
///
/// Each value is a function of the arguments and its position alone. So training does not depend on the world size, and a
/// rank draws its own shard and nothing else, however large the model is. Weights are uniform in `±1/sqrt(fan_in)`, as in
/// Burn's `Linear`.
pub fn expert_parameters(
    shape: ExpertShape,
    seed: u64,
    layer: usize,
    expert: usize,
    positions: Range<usize>,
) -> impl Iterator<Item = f32> {
    let stream = mix(mix(seed, layer as u64 + 1), expert as u64 + 1);
    let [gate_up_bound, down_bound] = [shape.hidden, shape.ffn].map(|fan_in| 1.0 / (fan_in as f32).sqrt());
    let (down_start, end) = (shape.gate_up_len(), shape.bias_start());
    // The number at this place of the sequence of SplitMix64, which is the same on every platform and in every version.
    let draw = move |position: usize| uniform(mix(stream, position as u64 + 1));
    positions.map(move |position| match position {
        _ if position < down_start => gate_up_bound * draw(position),
        _ if position < end => down_bound * draw(position),
        _ => 0.0,
    })
}

/// A number between -1 and 1 from random bits: the middle of one of 2^24 equal parts, all of which `f32` has exactly.
pub(crate) fn uniform(bits: u64) -> f32 {
    const PARTS: i32 = 1 << 24;
    let part = (bits >> 40) as i32;
    (2 * part + 1 - PARTS) as f32 / PARTS as f32
}

/// Mixes a number into a seed, so that neighbouring layers and experts draw unrelated values.
pub(crate) fn mix(seed: u64, value: u64) -> u64 {
    SplitMix64::at(seed, value.wrapping_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expert(shape: ExpertShape, seed: u64, layer: usize, expert: usize) -> Vec<f32> {
        expert_parameters(shape, seed, layer, expert, 0..shape.num_params()).collect()
    }

    #[test]
    fn shards_are_the_expert() {
        let shape = ExpertShape::new(3, 5);
        let params = expert(shape, 7, 0, 2);
        for world_size in [1, 2, 3, 4, 7, 8, 100] {
            let len = shape.shard_len(world_size);
            let shard = |rank| expert_parameters(shape, 7, 0, 2, rank * len..(rank + 1) * len);
            let whole: Vec<f32> = (0..world_size).flat_map(shard).collect();
            assert_eq!(whole.len(), world_size * len);
            assert_eq!(whole[..params.len()], params[..]);
            assert!(whole[params.len()..].iter().all(|&x| x == 0.0));
        }
    }

    /// Of 3 * 2^40 parameters: drawn, or held, whole they would take an hour and 12 TiB.
    #[test]
    fn a_shard_takes_no_more_than_itself() {
        let (shape, world_size) = (ExpertShape::new(1 << 20, 1 << 20), 1 << 36);
        let len = shape.shard_len(world_size);
        assert_eq!(len, 48);
        for rank in [0, 1, world_size / 2, world_size - 1] {
            let shard: Vec<f32> = expert_parameters(shape, 7, 0, 2, rank * len..(rank + 1) * len).collect();
            assert!(shard.len() == len && shard.iter().all(|&x| x != 0.0), "rank {rank}: {shard:?}");
        }
    }

    /// Mean and variance as of a uniform distribution in the bounds, within five standard errors; and neighbours, in a row
    /// and in the next expert, that have nothing to do with each other.
    #[test]
    fn values_are_uniform_and_independent() {
        let shape = ExpertShape::new(64, 256);
        let experts = [expert(shape, 0, 0, 0), expert(shape, 0, 0, 1), expert(shape, 0, 1, 0), expert(shape, 1, 0, 0)];
        let mean = |values: &mut dyn ExactSizeIterator<Item = f64>| {
            let len = values.len() as f64;
            (values.sum::<f64>() / len, len)
        };
        let (gate_up, down) = (0..shape.gate_up_len(), shape.gate_up_len()..shape.num_params());
        for (part, fan_in) in [(gate_up, shape.hidden), (down, shape.ffn)] {
            // On the scale of the bounds.
            let scaled = experts.each_ref().map(|params| {
                params[part.clone()].iter().map(|&x| f64::from(x) * (fan_in as f64).sqrt()).collect::<Vec<f64>>()
            });
            for values in &scaled {
                assert!(values.iter().all(|x| x.abs() <= 1.0));
                let largest = values.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
                assert!(largest > 0.999, "{largest}");
                let (sum, len) = mean(&mut values.iter().copied());
                assert!(sum.abs() < 5.0 * (1.0 / 3.0 / len).sqrt(), "mean {sum}");
                // x^2 has the mean 1/3 and the variance 1/5 - 1/9, x y of independent ones 0 and 1/9.
                let (squares, len) = mean(&mut values.iter().map(|x| x * x));
                assert!((squares - 1.0 / 3.0).abs() < 5.0 * (4.0 / 45.0 / len).sqrt(), "variance {squares}");
                let (products, len) = mean(&mut values.windows(2).map(|pair| pair[0] * pair[1]));
                assert!(products.abs() < 5.0 * (1.0 / 9.0 / len).sqrt(), "neighbours {products}");
            }
            for other in &scaled[1..] {
                let (products, len) = mean(&mut scaled[0].iter().zip(other).map(|(a, b)| a * b));
                assert!(products.abs() < 5.0 * (1.0 / 9.0 / len).sqrt(), "experts {products}");
            }
        }
    }

    #[test]
    fn experts_and_layers_differ() {
        let shape = ExpertShape::new(2, 2);
        let base = expert(shape, 0, 0, 0);
        assert_eq!(base, expert(shape, 0, 0, 0));
        for other in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            assert_ne!(base, expert(shape, other.0, other.1, other.2));
        }
    }

    /// On every platform: ranks of one job may run on different ones. These are Python's.
    #[test]
    fn values_of_a_seed_are_fixed() {
        let shape = ExpertShape::new(4, 1);
        let params: Vec<u32> = expert(shape, 7, 2, 3).into_iter().map(f32::to_bits).collect();
        assert_eq!(
            [0, 1, 7, 8, 11].map(|position| params[position]),
            [1053910183, 1044122678, 1042355538, 1035593256, 3207662497]
        );
    }
}
