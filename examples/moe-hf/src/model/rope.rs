use std::f32::consts::TAU;

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_fsep::hub::RopeScaling;

use crate::MoeHfError;

/// Rotary position embeddings (arXiv 2104.09864) as transformers' `modeling_rope_utils.py` computes them, in single precision
/// step by step: an angle is a position times a frequency, so the last bit of a frequency shows in long texts.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Size of a head.
    pub head_dim: usize,
    /// Positions that the model was made for (`max_position_embeddings`).
    pub max_positions: usize,
    /// How it is stretched to longer texts than it was trained on.
    scaling: RopeScaling,
}

impl RopeConfig {
    /// The embeddings of heads of this size.
    ///
    /// # Errors
    ///
    /// [`MoeHfError::Model`] if they are stretched in a way that is not known here.
    pub fn new(theta: f64, head_dim: usize, max_positions: usize, scaling: RopeScaling) -> Result<Self, MoeHfError> {
        use RopeScaling::{Default, Dynamic, Linear, Llama3, Yarn};
        match scaling {
            Default | Linear { .. } | Dynamic { .. } | Yarn { .. } | Llama3 { .. } => {
                Ok(Self { theta, head_dim, max_positions, scaling })
            }
            other => Err(MoeHfError::Model(format!(
                "position embeddings are stretched by {other:?}; known are default, linear, dynamic, yarn and llama3"
            ))),
        }
    }

    /// Angle a position of each pair of dimensions, for a text of `length` positions. Shape `[head_dim / 2]`.
    pub fn frequencies(&self, length: usize) -> Vec<f32> {
        let plain = |base: f64| -> Vec<f32> { powers(base, self.head_dim).map(|power| 1.0 / power).collect() };
        match &self.scaling {
            RopeScaling::Linear { factor } => plain(self.theta).into_iter().map(|f| f / *factor as f32).collect(),
            RopeScaling::Dynamic { factor } => {
                let (most, dim) = (self.max_positions as f64, self.head_dim as f64);
                let longest = length.max(self.max_positions) as f64;
                let stretched = factor * longest / most - (factor - 1.0);
                plain(self.theta * stretched.powf(dim / (dim - 2.0)))
            }
            RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } => {
                let factor = *factor as f32;
                let range =
                    self.yarn_range([*beta_fast, *beta_slow], *original_max_position_embeddings as f64, *truncate);
                powers(self.theta, self.head_dim)
                    .enumerate()
                    .map(|(pair, power)| {
                        let kept = 1.0 - ramp(range, pair);
                        1.0 / (factor * power) * (1.0 - kept) + 1.0 / power * kept
                    })
                    .collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let [factor, low, high] = [factor, low_freq_factor, high_freq_factor].map(|&f| f as f32);
                let original = *original_max_position_embeddings as f32;
                let scale = |f: f32| match TAU / f {
                    wavelength if wavelength < original / high => f,
                    wavelength if wavelength > original / low => f / factor,
                    wavelength => {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                plain(self.theta).into_iter().map(scale).collect()
            }
            // What else there is was refused.
            _ => plain(self.theta),
        }
    }

    /// What cosines and sines are multiplied by: attention gets sharper where texts are longer.
    pub fn attention_factor(&self) -> f32 {
        let (attention_factor, scale, mscale, mscale_all_dim) = match &self.scaling {
            RopeScaling::Yarn { attention_factor, factor, mscale, mscale_all_dim, .. } => {
                (attention_factor, *factor, mscale, mscale_all_dim)
            }
            _ => return 1.0,
        };
        let slope = |mscale: f64| if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 };
        let is_slope = |mscale: &Option<f64>| mscale.filter(|&mscale| mscale != 0.0);
        let factor = attention_factor.unwrap_or_else(|| match (is_slope(mscale), is_slope(mscale_all_dim)) {
            (Some(mscale), Some(all_dim)) => slope(mscale) / slope(all_dim),
            _ => slope(1.0),
        });
        factor as f32
    }

    /// Cosines and sines of the first `length` positions, in `dtype`.
    pub fn init(&self, length: usize, dtype: DType, device: &Device) -> Rope {
        let (frequencies, factor) = (self.frequencies(length), self.attention_factor());
        let angles = || (0..length).flat_map(|place| frequencies.iter().map(move |f| (place as f32 * f) as f64));
        let table = |function: fn(f64) -> f64| {
            let values: Vec<f32> = angles().map(|angle| function(angle) as f32 * factor).collect();
            let data = TensorData::new(values, [1, 1, length, frequencies.len()]);
            Tensor::<4>::from_data(data, device).cast(dtype)
        };
        Rope { cos: table(f64::cos), sin: table(f64::sin) }
    }

    /// Pairs of dimensions between which interpolation begins and is complete.
    fn yarn_range(&self, rotations: [f64; 2], original: f64, truncate: bool) -> [f64; 2] {
        let dim = self.head_dim as f64;
        let [low, high] = rotations
            .map(|rotations| dim * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln()));
        let [low, high] = if truncate { [low.floor(), high.ceil()] } else { [low, high] };
        [low.max(0.0), high.min(dim - 1.0)]
    }
}

/// `base^(2 i / dim)` for each pair of dimensions.
fn powers(base: f64, dim: usize) -> impl Iterator<Item = f32> {
    (0..dim).step_by(2).map(move |place| (base as f32).powf(place as f32 / dim as f32))
}

/// 0 up to the first number of the range, 1 from the second on.
fn ramp([low, high]: [f64; 2], pair: usize) -> f32 {
    let high = if low == high { high + 0.001 } else { high };
    ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0)
}

/// Cosines and sines of the positions of a text.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[1, 1, L, head_dim / 2]`
    pub(super) cos: Tensor<4>,
    /// `[1, 1, L, head_dim / 2]`
    pub(super) sin: Tensor<4>,
}

impl Rope {
    /// Turns each pair of dimensions `(i, i + head_dim / 2)` by its position's angle. `[B, H, L, head_dim]`, twice
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
        let [cos, sin] = [&self.cos, &self.sin].map(Clone::clone);
        let turned = first.clone() * cos.clone() - second.clone() * sin.clone();
        Tensor::cat(vec![turned, second * cos + first * sin], 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: RopeScaling) -> RopeConfig {
        RopeConfig::new(10000.0, 8, 64, scaling).unwrap()
    }

    fn assert_near(actual: &[f32], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            assert!((f64::from(*a) - e).abs() <= 3e-7 * e.abs(), "{actual:?} is not {expected:?}");
        }
    }

    /// 10000^(-2i/8), and a tenth of a position's angle where positions are divided by 10.
    #[test]
    fn plain_and_linear_frequencies() {
        assert_near(&config(RopeScaling::Default).frequencies(9), &[1.0, 0.1, 0.01, 0.001]);
        assert_near(&config(RopeScaling::Linear { factor: 10.0 }).frequencies(9), &[0.1, 0.01, 0.001, 0.0001]);
    }

    /// Twice the positions: the base is 10000 * (4 * 2 - 3)^(8/6).
    #[test]
    fn dynamic_frequencies_change_beyond_the_positions_of_the_model() {
        let config = config(RopeScaling::Dynamic { factor: 4.0 });
        assert_near(&config.frequencies(64), &[1.0, 0.1, 0.01, 0.001]);
        let base = 10000.0 * 5f64.powf(8.0 / 6.0);
        assert_near(&config.frequencies(128), &[0.0, -0.25, -0.5, -0.75].map(|power| base.powf(power)));
    }

    /// Wavelengths 6.28, 62.8, 628, 6283 beside 1024 / 4 = 256 and 1024 / 1: the third is between, with
    /// (1024 / 628.3 - 1) / 3 = 0.2099 of it left as it is.
    #[test]
    fn llama3_interpolates_long_waves() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 1024,
        };
        let smooth = (1024.0 / (std::f64::consts::TAU * 100.0) - 1.0) / 3.0;
        let middle = 0.01 * ((1.0 - smooth) / 8.0 + smooth);
        assert_near(&config(scaling).frequencies(9), &[1.0, 0.1, middle, 0.001 / 8.0]);
    }

    /// 32 rotations in 4096 positions are 8 ln(4096 / (32 tau)) / (2 ln 10000) = 1.309 dimensions, one is 2.814: truncated,
    /// pairs 0 and 1 stay, 3 is divided by 4, and 2 is half way.
    #[test]
    fn yarn_interpolates_between_two_dimensions() {
        let yarn = |truncate, attention_factor, mscale: [Option<f64>; 2]| {
            config(RopeScaling::Yarn {
                factor: 4.0,
                original_max_position_embeddings: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor,
                mscale: mscale[0],
                mscale_all_dim: mscale[1],
                truncate,
            })
        };
        let plain = yarn(true, None, [None; 2]);
        assert_near(&plain.frequencies(9), &[1.0, 0.1, 0.01 * 0.625, 0.00025]);
        assert_near(&[plain.attention_factor()], &[0.1 * 4f64.ln() + 1.0]);
        assert_near(&[yarn(true, Some(1.5), [None; 2]).attention_factor()], &[1.5]);
        assert_near(&[yarn(true, None, [Some(1.0), Some(1.0)]).attention_factor()], &[1.0]);
        let [low, high] = [32.0, 1.0]
            .map(|rotations| 8.0 * (4096.0 / (rotations * std::f64::consts::TAU)).ln() / (2.0 * 10000f64.ln()));
        let kept = 1.0 - (2.0 - low) / (high - low);
        let sharp = yarn(false, None, [None; 2]).frequencies(9);
        assert!((f64::from(sharp[2]) - 0.01 * (kept + (1.0 - kept) / 4.0)).abs() < 1e-8, "{sharp:?}");
    }

    /// At position 1 the pair (1, 3) of ones with angles 1 and 0.01 becomes (cos - sin, cos + sin).
    #[test]
    fn pairs_are_half_a_head_apart() {
        let rope = RopeConfig { head_dim: 4, ..config(RopeScaling::Default) };
        let x = Tensor::<4>::from_data([[[[1f32, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]]]], &Device::flex());
        let y: Vec<f32> = rope.init(2, DType::F32, &Device::flex()).rotate(x).into_data().iter::<f32>().collect();
        assert_eq!(y[..4], [1.0; 4]);
        let turn = |a: f64, b: f64, angle: f64| [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()];
        let ([a, c], [b, d]) = (turn(1.0, 3.0, 1.0), turn(2.0, 4.0, 0.01));
        for (actual, expected) in y[4..].iter().zip([a, b, c, d]) {
            assert!((f64::from(*actual) - expected).abs() < 1e-6, "{y:?}");
        }
    }
}
