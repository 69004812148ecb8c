use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::Uniform;
use serde::{Deserialize, Serialize};

/// The sizes of one SwiGLU expert, and how its parameters lie in the flat vector of length `P = 3 * D * F`.
///
/// The vector holds `gate [F, D]`, `up [F, D]`, `down [D, F]`, row-major and in this order: the convention of
/// `[out, in]` weights. Gate and up together are one `[2F, D]` matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExpertShape {
    /// Hidden size `D`.
    pub hidden: usize,
    /// Intermediate size `F`.
    pub ffn: usize,
}

impl ExpertShape {
    /// Parameters `P` of one expert.
    pub fn num_params(&self) -> usize {
        3 * self.hidden * self.ffn
    }

    /// Parameters of gate and up together: where `down` starts.
    pub fn gate_up_len(&self) -> usize {
        2 * self.hidden * self.ffn
    }

    /// Shard length `S = ceil(P / N)`; the last shards are padded with zeros.
    pub fn shard_len(&self, world_size: usize) -> usize {
        self.num_params().div_ceil(world_size)
    }
}

/// The initial parameters of one expert. Shape `[P]`.
///
/// A function of its arguments alone, so that every rank can make any expert and cut its shard from it, and training
/// does not depend on the world size. Weights are uniform in `±1/sqrt(fan_in)`, as in Burn's `Linear`.
pub fn expert_parameters(shape: ExpertShape, seed: u64, layer: usize, expert: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(mix(mix(seed, layer as u64 + 1), expert as u64 + 1));
    let mut params = Vec::with_capacity(shape.num_params());
    let mut draw = |len: usize, fan_in: usize| {
        let bound = 1.0 / (fan_in as f32).sqrt();
        let uniform = Uniform::new_inclusive(-bound, bound).expect("a positive fan-in gives a valid range");
        params.extend((0..len).map(|_| rng.sample(uniform)));
    };
    draw(shape.gate_up_len(), shape.hidden);
    draw(shape.num_params() - shape.gate_up_len(), shape.ffn);
    params
}

/// The shard of a rank, zero-padded. Shape `[P] -> [S]`.
///
/// # Panics
///
/// If `rank >= world_size`.
pub fn shard_of(params: &[f32], rank: usize, world_size: usize) -> Vec<f32> {
    assert!(rank < world_size, "rank {rank} of {world_size}");
    let len = params.len().div_ceil(world_size);
    let start = (rank * len).min(params.len());
    let end = (start + len).min(params.len());
    let mut shard = params[start..end].to_vec();
    shard.resize(len, 0.0);
    shard
}

/// Mixes a number into a seed (the finaliser of SplitMix64), so that neighbouring layers and experts draw unrelated
/// values.
pub(crate) fn mix(seed: u64, value: u64) -> u64 {
    let mut z = seed.wrapping_add(value.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_the_expert() {
        let shape = ExpertShape { hidden: 3, ffn: 5 };
        let params = expert_parameters(shape, 7, 0, 2);
        for world_size in [1, 2, 4, 7, 100] {
            let whole: Vec<f32> = (0..world_size).flat_map(|rank| shard_of(&params, rank, world_size)).collect();
            assert_eq!(whole.len(), world_size * shape.shard_len(world_size));
            assert_eq!(whole[..params.len()], params[..]);
            assert!(whole[params.len()..].iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn experts_and_layers_differ() {
        let shape = ExpertShape { hidden: 2, ffn: 2 };
        let base = expert_parameters(shape, 0, 0, 0);
        assert_eq!(base, expert_parameters(shape, 0, 0, 0));
        for other in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            assert_ne!(base, expert_parameters(shape, other.0, other.1, other.2));
        }
    }
}
