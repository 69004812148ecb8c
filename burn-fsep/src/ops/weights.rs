use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{Shape, Slice},
};

use super::{
    MoeStep, WeightStorage,
    host::{PendingTensor, start_exchange},
};
use crate::{
    FsepError,
    shard::{ExpertShape, RestoredGuard, sum_replicas},
};

/// The weights of the expert in one slot.
pub(super) struct SlotWeights<B: Backend> {
    /// `[2F, D]`
    pub gate_up: FloatTensor<B>,
    /// `[D, F]`
    pub down: FloatTensor<B>,
}

/// Whole experts, one a slot, for as long as a layer computes.
pub(super) struct RestoredWeights<B: Backend> {
    pub slots: Vec<SlotWeights<B>>,
    /// Counts the weights as alive; resident experts are not restored and not counted.
    _guard: Option<RestoredGuard>,
}

/// Experts on their way to their slots.
pub(super) enum PendingWeights<B: Backend> {
    Resident(FloatTensor<B>),
    Restoring(PendingTensor<B>),
}

/// Starts to restore the experts that the layout gives this rank.
pub(super) fn start_unshard<B: Backend>(
    weights: FloatTensor<B>,
    step: &MoeStep,
    name: &'static str,
) -> Result<PendingWeights<B>, FsepError> {
    match step.storage {
        WeightStorage::Resident => Ok(PendingWeights::Resident(weights)),
        WeightStorage::Sharded => {
            let operation = step.operation(name);
            let comm = step.runtime.weights_comm();
            start_exchange::<B>(weights, comm, operation, &step.unshard.unshard).map(PendingWeights::Restoring)
        }
    }
}

impl<B: Backend> PendingWeights<B> {
    /// Waits until the experts are there.
    pub fn wait(self, step: &MoeStep) -> Result<RestoredWeights<B>, FsepError> {
        let experts = step.experts();
        match self {
            PendingWeights::Resident(weights) => {
                let slot = |&e: &u32| slot_weights::<B>(&weights, step.resident_row(e as usize), step.shape);
                Ok(RestoredWeights { slots: experts.iter().map(slot).collect(), _guard: None })
            }
            PendingWeights::Restoring(pending) => {
                let padded = step.world_size() * step.shape.shard_len(step.world_size());
                let guard = step.runtime.restored_gauge().hold(experts.len() * padded * pending.element_size());
                let weights = pending.wait([experts.len(), padded])?;
                let slots = (0..experts.len()).map(|slot| slot_weights::<B>(&weights, slot, step.shape)).collect();
                Ok(RestoredWeights { slots, _guard: Some(guard) })
            }
        }
    }
}

/// Views of one row of flat parameters `[.., >= P]` as matrices.
fn slot_weights<B: Backend>(weights: &FloatTensor<B>, row: usize, shape: ExpertShape) -> SlotWeights<B> {
    let part = |range: std::ops::Range<usize>, dims: [usize; 2]| {
        let slices = [Slice::from(row..row + 1), Slice::from(range)];
        B::float_reshape(B::float_slice(weights.clone(), &slices), Shape::new(dims))
    };
    SlotWeights {
        gate_up: part(0..shape.gate_up_len(), [2 * shape.ffn, shape.hidden]),
        down: part(shape.gate_up_len()..shape.num_params(), [shape.hidden, shape.ffn]),
    }
}

/// Gradients of whole experts on their way back to the shards.
pub(super) enum PendingGradient<B: Backend> {
    Resident(FloatTensor<B>),
    Resharding(PendingTensor<B>, burn::backend::tensor::Device<B>),
}

/// Starts to return the slots' gradients to the shards.
///
/// The result is the gradient of the mean over ranks of their losses, hence the division by `N`.
pub(super) fn start_reshard<B: Backend>(
    gradients: Vec<SlotWeights<B>>,
    step: &MoeStep,
) -> Result<PendingGradient<B>, FsepError> {
    let (shape, ranks) = (step.shape, step.world_size());
    let (dtype, device) = match gradients.first() {
        Some(slot) => (slot.down.dtype(), slot.down.device()),
        None => return Err(FsepError::Config("a rank without slots cannot return gradients".into())),
    };
    let flat = |tensor: FloatTensor<B>| {
        let len = tensor.shape().num_elements();
        B::float_reshape(tensor, Shape::new([len]))
    };
    match step.storage {
        WeightStorage::Resident => {
            let mut by_row: Vec<(usize, SlotWeights<B>)> =
                step.experts().iter().map(|&expert| step.resident_row(expert as usize)).zip(gradients).collect();
            by_row.sort_by_key(|(row, _)| *row);
            let rows = by_row.len();
            let parts = by_row.into_iter().flat_map(|(_, slot)| [flat(slot.gate_up), flat(slot.down)]).collect();
            let all = B::float_reshape(B::float_cat(parts, 0), Shape::new([rows, shape.num_params()]));
            let scaled = if ranks == 1 { all } else { B::float_mul_scalar(all, (1.0 / ranks as f64).into()) };
            Ok(PendingGradient::Resident(scaled))
        }
        WeightStorage::Sharded => {
            let padding = ranks * shape.shard_len(ranks) - shape.num_params();
            let parts = gradients
                .into_iter()
                .flat_map(|slot| {
                    let pad = B::float_zeros(Shape::new([padding]), &device, dtype.into());
                    let pad = (padding > 0).then_some(pad);
                    [Some(flat(slot.gate_up)), Some(flat(slot.down)), pad].into_iter().flatten()
                })
                .collect();
            let operation = step.operation("gradient reshard");
            let comm = step.runtime.weights_comm();
            let pending = start_exchange::<B>(B::float_cat(parts, 0), comm, operation, &step.unshard.reshard)?;
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
                let (bytes, dtype) = pending.wait_bytes()?;
                let ranks = step.world_size();
                let shard_len = step.shape.shard_len(ranks);
                let sums = sum_replicas(&bytes, dtype, &step.layout, shard_len, 1.0 / ranks as f64);
                Ok(B::float_from_data(sums, &device))
            }
        }
    }
}
