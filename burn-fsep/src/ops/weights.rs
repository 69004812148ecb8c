use std::sync::Arc;

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{FloatDType, Shape, Slice},
};

use super::{FsepKernels, MoeStep, exchange::PendingTensor, extension::start_restore};
use crate::{
    FsepError, FsepRuntime,
    comm::Operation,
    schedule::Restore,
    shard::{ExpertShape, RepairPlan, RestoredGuard},
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

/// What a [`Restore`] that was started holds.
enum Started<B: Backend> {
    Travelling(PendingTensor<B>, RestoredGuard),
    /// Kept from the forward pass.
    Here(ExpertWeights<B>),
}

/// Starts a restore, unless that was done already.
pub(super) fn start<B: FsepKernels>(
    weights: FloatTensor<B>,
    restore: &Restore,
    runtime: &FsepRuntime,
) -> Result<(), FsepError> {
    if restore.is_started() {
        return Ok(());
    }
    let weights = cast::<B>(weights, restore.dtype);
    let plan = &restore.plan.unshard;
    let bytes = plan.recv_len * weights.dtype().size();
    let pending = B::fsep_start_exchange(weights, runtime.weights_comm(), restore.operation, plan)?;
    restore.put(Started::<B>::Travelling(pending, runtime.restored_gauge().hold(bytes)));
    Ok(())
}

/// Experts on their way to their slots.
pub(super) enum PendingWeights<B: Backend> {
    Resident(FloatTensor<B>),
    Restoring(Arc<Restore>, Option<Repair<B>>),
}

/// Slots whose expert changed since the restore was started.
pub(super) struct Repair<B: Backend> {
    pending: PendingTensor<B>,
    slots: Vec<usize>,
    _guard: RestoredGuard,
}

/// The experts that the layout gives this rank: starts to restore them, if nobody did so ahead. `weights` are this
/// rank's parameters, `[E, S]` or `[E / N, P]`.
pub(super) fn start_unshard<B: FsepKernels>(
    weights: &FloatTensor<B>,
    step: &MoeStep,
    restore: Option<&Arc<Restore>>,
) -> Result<PendingWeights<B>, FsepError> {
    let Some(restore) = restore else {
        return Ok(PendingWeights::Resident(cast::<B>(weights.clone(), step.compute_dtype)));
    };
    start_restore(restore, &step.runtime)?;
    let (rank, shard_len) = (step.runtime.rank(), step.shape.shard_len(step.world_size()));
    let repair = match RepairPlan::new(&restore.layout, &step.layout, rank, shard_len) {
        None => None,
        Some(RepairPlan { exchange, slots }) => {
            let operation = step.operation("restore of changed slots");
            let weights = cast::<B>(weights.clone(), step.compute_dtype);
            let _guard = step.runtime.restored_gauge().hold(exchange.recv_len * weights.dtype().size());
            let pending = B::fsep_start_exchange(weights, step.runtime.weights_comm(), operation, &exchange)?;
            Some(Repair { pending, slots, _guard })
        }
    };
    Ok(PendingWeights::Restoring(restore.clone(), repair))
}

impl<B: FsepKernels> PendingWeights<B> {
    /// Waits until the experts are there.
    pub fn wait(self, step: &MoeStep) -> Result<ExpertWeights<B>, FsepError> {
        let experts = step.experts();
        let (restore, repair) = match self {
            PendingWeights::Resident(flat) => {
                let rows = experts.iter().map(|&expert| step.resident_row(expert as usize)).collect();
                return Ok(ExpertWeights { flat, rows, shape: step.shape, _guard: None });
            }
            PendingWeights::Restoring(restore, repair) => (restore, repair),
        };
        let mut weights = match restore.take::<Started<B>>() {
            Some(Started::Here(weights)) => weights,
            Some(Started::Travelling(pending, guard)) => {
                let padded = step.world_size() * step.shape.shard_len(step.world_size());
                let flat = pending.wait([experts.len(), padded])?;
                let rows = (0..experts.len()).collect();
                ExpertWeights { flat, rows, shape: step.shape, _guard: Some(guard) }
            }
            None => return Err(lost(restore.operation)),
        };
        if let Some(repair) = repair {
            weights.flat = repair.apply(weights.flat)?;
        }
        Ok(weights)
    }
}

impl<B: Backend> Repair<B> {
    /// Waits for the changed slots and puts them in their place. `[C, N * S] -> [C, N * S]`
    fn apply(self, flat: FloatTensor<B>) -> Result<FloatTensor<B>, FsepError> {
        let padded = flat.shape()[1];
        let restored = self.pending.wait([self.slots.len(), padded])?;
        let row = |i: usize| [Slice::from(i..i + 1), Slice::from(0..padded)];
        let place = |flat, (i, slot): (usize, usize)| {
            B::float_slice_assign(flat, &row(slot), B::float_slice(restored.clone(), &row(i)))
        };
        Ok(self.slots.into_iter().enumerate().fold(flat, place))
    }
}

/// Frees the experts of a forward pass, or keeps them where backward comes next.
pub(super) fn finish_forward<B: FsepKernels>(weights: ExpertWeights<B>, step: &MoeStep) {
    if let Some(restores) = step.restores.as_ref().filter(|restores| restores.keep) {
        restores.backward.put(Started::<B>::Here(weights));
    }
}

pub(super) fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: Option<FloatDType>) -> FloatTensor<B> {
    match dtype {
        Some(dtype) if tensor.dtype() != dtype.into() => B::float_cast(tensor, dtype),
        _ => tensor,
    }
}

fn lost(operation: Operation) -> FsepError {
    FsepError::Device(format!("`{operation}` was started on another backend than the layer runs on"))
}
