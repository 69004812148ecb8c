use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{FloatDType, Shape, Slice},
};
use burn_fsep_planner::Layout;

use super::{
    FsepKernels, MoeStep, WeightStorage,
    exchange::{PendingTensor, Received},
};
use crate::{
    FsepError,
    shard::{ExpertShape, RestoredGuard, sum_replicas},
};

/// Whole experts, one a slot, for as long as a layer computes.
#[derive(Debug)]
pub struct ExpertWeights<B: Backend> {
    /// Flat parameters of one expert a row: `gate_up` `[2F, D]`, then `down` `[D, F]`, then padding. `[rows, >= P]`
    pub flat: FloatTensor<B>,
    /// The row of each slot's expert. Shape `[C]`.
    pub rows: Vec<usize>,
    /// Sizes of an expert.
    pub shape: ExpertShape,
    /// Counts the weights as alive; resident experts are not restored and not counted.
    _guard: Option<RestoredGuard>,
}

impl<B: Backend> ExpertWeights<B> {
    /// A view of the slot's gate and up projection. `[2F, D]`
    pub fn gate_up(&self, slot: usize) -> FloatTensor<B> {
        self.part(slot, 0..self.shape.gate_up_len(), [2 * self.shape.ffn, self.shape.hidden])
    }

    /// A view of the slot's down projection. `[D, F]`
    pub fn down(&self, slot: usize) -> FloatTensor<B> {
        self.part(slot, self.shape.gate_up_len()..self.shape.num_params(), [self.shape.hidden, self.shape.ffn])
    }

    fn part(&self, slot: usize, range: std::ops::Range<usize>, dims: [usize; 2]) -> FloatTensor<B> {
        let row = self.rows[slot];
        let slices = [Slice::from(row..row + 1), Slice::from(range)];
        B::float_reshape(B::float_slice(self.flat.clone(), &slices), Shape::new(dims))
    }
}

/// Experts on their way to their slots.
pub(super) enum PendingWeights<B: Backend> {
    Resident(FloatTensor<B>),
    Restoring(PendingTensor<B>),
}

/// Starts to restore the experts that the layout gives this rank.
pub(super) fn start_unshard<B: FsepKernels>(
    weights: FloatTensor<B>,
    step: &MoeStep,
    name: &'static str,
) -> Result<PendingWeights<B>, FsepError> {
    match step.storage {
        WeightStorage::Resident => Ok(PendingWeights::Resident(weights)),
        WeightStorage::Sharded => {
            let operation = step.operation(name);
            let comm = step.runtime.weights_comm();
            B::fsep_start_exchange(weights, comm, operation, &step.unshard.unshard).map(PendingWeights::Restoring)
        }
    }
}

impl<B: Backend> PendingWeights<B> {
    /// Waits until the experts are there.
    pub fn wait(self, step: &MoeStep) -> Result<ExpertWeights<B>, FsepError> {
        let experts = step.experts();
        match self {
            PendingWeights::Resident(flat) => {
                let rows = experts.iter().map(|&expert| step.resident_row(expert as usize)).collect();
                Ok(ExpertWeights { flat, rows, shape: step.shape, _guard: None })
            }
            PendingWeights::Restoring(pending) => {
                let padded = step.world_size() * step.shape.shard_len(step.world_size());
                let guard = step.runtime.restored_gauge().hold(experts.len() * padded * pending.element_size());
                let flat = pending.wait([experts.len(), padded])?;
                Ok(ExpertWeights { flat, rows: (0..experts.len()).collect(), shape: step.shape, _guard: Some(guard) })
            }
        }
    }
}

/// Gradients of whole experts on their way back to the shards.
pub(super) enum PendingGradient<B: Backend> {
    Resident(FloatTensor<B>),
    Resharding(PendingTensor<B>, burn::backend::tensor::Device<B>),
}

/// Starts to return the slots' gradients, shaped as [`ExpertWeights::flat`], to the shards.
///
/// The result is the gradient of the mean over ranks of their losses, hence the division by `N`.
pub(super) fn start_reshard<B: FsepKernels>(
    gradients: FloatTensor<B>,
    step: &MoeStep,
) -> Result<PendingGradient<B>, FsepError> {
    let ranks = step.world_size();
    match step.storage {
        WeightStorage::Resident if ranks == 1 => Ok(PendingGradient::Resident(gradients)),
        WeightStorage::Resident => {
            Ok(PendingGradient::Resident(B::float_mul_scalar(gradients, (1.0 / ranks as f64).into())))
        }
        WeightStorage::Sharded => {
            let device = gradients.device();
            let operation = step.operation("gradient reshard");
            let comm = step.runtime.weights_comm();
            let pending = B::fsep_start_exchange(gradients, comm, operation, &step.unshard.reshard)?;
            Ok(PendingGradient::Resharding(pending, device))
        }
    }
}

impl<B: Backend> PendingGradient<B> {
    /// Waits for the other ranks' parts and sums them over replicas. `[E, S]`, or `[E / N, P]` of resident experts.
    pub fn wait(self, step: &MoeStep) -> Result<FloatTensor<B>, FsepError> {
        match self {
            PendingGradient::Resident(gradient) => Ok(gradient),
            PendingGradient::Resharding(pending, device) => {
                let ranks = step.world_size();
                let (shard_len, scale) = (step.shape.shard_len(ranks), 1.0 / ranks as f64);
                Ok(match pending.wait_raw()? {
                    Received::Host(bytes, dtype) => {
                        let sums = sum_replicas(&bytes, dtype, &step.layout, shard_len, scale);
                        B::float_from_data(sums, &device)
                    }
                    Received::Device(received) => sum_replicas_on_device::<B>(received, &step.layout, shard_len, scale),
                })
            }
        }
    }
}

/// [`sum_replicas`] without leaving the device: `[N * C * S] -> [E, S]`, in rank order, half precision summed in single.
fn sum_replicas_on_device<B: Backend>(
    received: FloatTensor<B>,
    layout: &Layout,
    shard_len: usize,
    scale: f64,
) -> FloatTensor<B> {
    let dtype: FloatDType = received.dtype().into();
    let is_half = matches!(dtype, FloatDType::BF16 | FloatDType::F16);
    let device = received.device();
    let experts = layout.num_experts();
    let mut sums: Vec<Option<FloatTensor<B>>> = vec![None; experts];
    for (slot, &expert) in layout.as_slice().iter().enumerate() {
        let part = B::float_slice(received.clone(), &[Slice::from(slot * shard_len..(slot + 1) * shard_len)]);
        let part = if is_half { B::float_cast(part, FloatDType::F32) } else { part };
        let sum = &mut sums[expert as usize];
        *sum = Some(match sum.take() {
            Some(sum) => B::float_add(sum, part),
            None => part,
        });
    }
    let scaled = |sum: Option<FloatTensor<B>>| match sum {
        Some(sum) => {
            let sum = B::float_mul_scalar(sum, scale.into());
            if is_half { B::float_cast(sum, dtype) } else { sum }
        }
        None => B::float_zeros(Shape::new([shard_len]), &device, dtype),
    };
    let sums = sums.into_iter().map(scaled).collect();
    B::float_reshape(B::float_cat(sums, 0), Shape::new([experts, shard_len]))
}
