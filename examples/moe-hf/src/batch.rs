use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_fsep::{
    FsepRuntime,
    moe::{TokenMask, pooled_load_balancing_loss},
    train::token_mean,
};

use crate::model::{CausalLm, FeedForward, next_token_loss};

/// A rank's part of a batch of texts.
#[derive(Debug, Clone)]
pub struct TokenBatch {
    /// Padded at the end. `[B, L]`
    pub ids: Tensor<2, Int>,
    /// Which tokens are real; `None` if all are.
    pub mask: Option<TokenMask>,
    /// The token after each; 0 where there is none. `[B * L]`
    targets: Tensor<1, Int>,
    /// 1 for tokens that have one after them, otherwise 0. `[B * L]`
    weights: Tensor<1>,
    /// How many have.
    num_targets: usize,
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
        let flags = |last: usize| -> Vec<bool> {
            lens.iter().flat_map(|&len| (0..length).map(move |place| place + last < len)).collect()
        };
        let (real, has_next) = (flags(0), flags(1));
        let mut targets: Vec<i32> = ids[1..].iter().copied().chain([0]).collect();
        targets.iter_mut().zip(&has_next).for_each(|(target, &has_next)| *target *= i32::from(has_next));
        let weights: Vec<f32> = has_next.iter().map(|&has_next| f32::from(u8::from(has_next))).collect();
        let num_targets = has_next.iter().filter(|&&has_next| has_next).count();
        Self {
            ids: Tensor::from_data(TensorData::new(ids, [batch, length]), device),
            mask: real.contains(&false).then(|| TokenMask::new(&real, device)),
            targets: Tensor::from_data(TensorData::new(targets, [batch * length]), device),
            weights: Tensor::from_data(TensorData::new(weights, [batch * length]), (device, DType::F32)),
            num_targets,
        }
    }

    /// A rank's part of the texts of all ranks.
    pub fn of_rank(texts: &[Vec<u32>], runtime: &FsepRuntime, device: &Device) -> Self {
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        Self::new(&texts[rows_of(runtime.rank(), runtime.world_size(), texts.len())], longest, device)
    }
}

impl CausalLm {
    /// The rank's loss, whose mean over ranks is the mean over all predicted tokens of minus their log probability, plus
    /// `aux_loss_coeff` times transformers' load-balancing loss, which pools the layers. Collective. `[1]`
    ///
    /// # Panics
    ///
    /// As [`CausalLm::forward`].
    pub fn loss(&self, batch: &TokenBatch, aux_loss_coeff: f64, runtime: &FsepRuntime) -> Tensor<1> {
        let output = self.forward(batch.ids.clone(), batch.mask.as_ref());
        let sum = next_token_loss(output.logits, batch.targets.clone(), batch.weights.clone());
        let loss = token_mean(runtime, sum, batch.num_targets);
        if aux_loss_coeff == 0.0 || output.routings.is_empty() {
            return loss;
        }
        let balancing = pooled_load_balancing_loss(&output.routings).unwrap_or_else(|error| panic!("{error}"));
        loss + balancing * aux_loss_coeff
    }

    /// Leaves the routers as they are while all else is trained.
    pub fn freeze_routers(mut self) -> Self {
        for layer in &mut self.model.layers {
            if let FeedForward::Sparse(moe) = &mut layer.mlp {
                moe.router.weight = moe.router.weight.clone().set_require_grad(false);
            }
        }
        self
    }
}
