use crate::SplitMix64;

/// What random numbers are for: each purpose has a stream of its own, so that none depends on how many another draws.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    /// Which experts are popular.
    Places,
    /// How popular they are.
    Popularity,
    /// What changes from step to step.
    Step,
    /// How many tokens ranks have.
    Tokens,
    /// How nodes differ.
    Nodes,
    /// Which experts the tokens of a rank happen to choose.
    Sampling,
}

/// Random numbers for one purpose at one place.
#[derive(Debug, Clone)]
pub(super) struct Draws(SplitMix64);

impl Draws {
    pub fn new(seed: u64, layer: usize, purpose: Purpose, at: u64) -> Self {
        let words = [layer as u64, purpose as u64, at];
        let state =
            words.into_iter().fold(seed, |state, word| SplitMix64::new(state ^ word.rotate_left(32)).next_u64());
        Self(SplitMix64::new(state))
    }

    /// In `0 .. 1`.
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Of mean 0 and deviation 1, nearly normal: a sum of uniform numbers, which is the same on every platform.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    /// `0..n` in random order.
    pub fn order(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        self.0.shuffle(&mut order);
        order
    }
}
