use serde::{Deserialize, Serialize};

/// SplitMix64: a small generator that is the same on every platform and in every version, since all ranks must draw
/// the same numbers.
///
/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. Not for secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitMix64(u64);

/// What each number adds to the state.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

impl SplitMix64 {
    /// A generator with a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The number at place `index`, from 0, of a seed's sequence, without those before it. With the result as another seed,
    /// numbers are a function of several indices: `SplitMix64::at(SplitMix64::at(seed, layer), expert)`.
    pub fn at(seed: u64, index: u64) -> u64 {
        let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        let number = Self::at(self.0, 0);
        self.0 = self.0.wrapping_add(GAMMA);
        number
    }

    /// A number below `n`, which is positive and far below 2^32.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// A number from 0 to 1, exclusive of 0.
    pub fn unit(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// A number of the normal distribution (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Puts values into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of the authors' own code, as Vigna publishes it (`splitmix64.c`).
    #[test]
    fn numbers_are_those_of_the_reference() {
        let expected =
            [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821];
        let mut random = SplitMix64::new(1234567);
        assert_eq!([(); 5].map(|()| random.next_u64()), expected);
        assert_eq!([0, 1, 2, 3, 4].map(|index| SplitMix64::at(1234567, index)), expected);
    }
}
