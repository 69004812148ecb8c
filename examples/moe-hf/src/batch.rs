use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_fsep::{FsepRuntime, moe::TokenMask, train::token_mean};

use crate::model::{CausalLm, next_token_loss};

/// A rank's part of a batch of texts.
#[derive(Debug, Clone)]
pub struct TokenBatch {
    /// Padded at the end. `[B, L]`
    pub ids: Tensor<2, Int>,
    /// Which tokens are real; `None` if all are.
    pub mask: Option<TokenMask>,
    /// The same as 1 and 0. `[B, L]`
    real: Option<Tensor<2>>,
    /// Tokens that are predicted: all but the first of each text.
    targets: usize,
}

/// Rows of a batch that are a rank's.
pub fn rows_of(rank: usize, ranks: usize, rows: usize) -> Range<usize> {
    rank * rows / ranks..(rank + 1) * rows / ranks
}

impl TokenBatch {
    /// `rows` are a rank's texts and `length` that of the longest text of all ranks: with it the batch is the same however it
    /// is split, also where positions depend on the length. A rank without a text takes part with padding alone.
    pub fn new(rows: &[Vec<u32>], length: usize, device: &Device) -> Self {
        let (batch, length) = (rows.len().max(1), length.max(1));
        let lens: Vec<usize> = (0..batch).map(|row| rows.get(row).map_or(0, Vec::len)).collect();
        let mut ids = vec![0i32; batch * length];
        for (row, tokens) in rows.iter().enumerate() {
            ids[row * length..][..tokens.len()].iter_mut().zip(tokens).for_each(|(id, &token)| *id = token as i32);
        }
        let real: Vec<bool> = lens.iter().flat_map(|&len| (0..length).map(move |place| place < len)).collect();
        let is_padded = real.contains(&false);
        let as_number = || {
            let values = real.iter().map(|&real| f32::from(u8::from(real))).collect();
            Tensor::<2>::from_data(TensorData::new(values, [batch, length]), (device, DType::F32))
        };
        Self {
            ids: Tensor::from_data(TensorData::new(ids, [batch, length]), device),
            mask: is_padded.then(|| TokenMask::new(&real, device)),
            real: is_padded.then(as_number),
            targets: lens.iter().map(|len| len.saturating_sub(1)).sum(),
        }
    }

    /// A rank's part of the texts of all ranks.
    pub fn of_rank(texts: &[Vec<u32>], runtime: &FsepRuntime, device: &Device) -> Self {
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        Self::new(&texts[rows_of(runtime.rank(), runtime.world_size(), texts.len())], longest, device)
    }
}

impl CausalLm {
    /// The rank's loss, whose mean over ranks is the mean over all predicted tokens of minus their log probability.
    /// Collective. `[1]`
    ///
    /// # Panics
    ///
    /// As [`CausalLm::forward`].
    pub fn loss(&self, batch: &TokenBatch, runtime: &FsepRuntime) -> Tensor<1> {
        let output = self.forward(batch.ids.clone(), batch.mask.as_ref());
        let sum = next_token_loss(output.logits, batch.ids.clone(), batch.real.clone());
        token_mean(runtime, sum, batch.targets)
    }
}
