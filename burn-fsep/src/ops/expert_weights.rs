//! Experts on their way to the slots where they compute.

use std::{any::Any, sync::Arc};

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{FloatDType, Slice},
};

use super::{
    FsepKernels, LayerPass, RankContext, Unshard,
    tensor_exchange::PendingTensor,
    types::{ExpertWeights, cast},
};
use crate::{
    FsepError,
    comm::Operation,
    shard::{RepairPlan, UnshardPlan, UnshardedGuard},
};

/// What the start of an unshard has to know besides the shards.
pub struct UnshardRequest {
    pub operation: Operation,
    pub plan: Arc<UnshardPlan>,
    /// Type that experts travel and compute in; that of the shards if `None`.
    pub dtype: Option<FloatDType>,
    pub context: Arc<RankContext>,
}

/// What an [`Unshard`] holds once it is started.
enum Unsharding<B: Backend> {
    Travelling(PendingTensor<B>, UnshardedGuard),
    /// Kept from the forward pass.
    Kept(ExpertWeights<B>),
}

/// Starts the All-to-All of an unshard.
pub(super) fn start<B: FsepKernels>(
    weights: FloatTensor<B>,
    request: UnshardRequest,
) -> Result<Box<dyn Any + Send>, FsepError> {
    let UnshardRequest { operation, plan, dtype, context } = request;
    let weights = cast::<B>(weights, dtype);
    let bytes = plan.unshard.recv_len * weights.dtype().size();
    let pending = B::fsep_start_exchange(weights, context.weights.as_ref(), operation, &plan.unshard)?;
    Ok(Box::new(Unsharding::<B>::Travelling(pending, context.gauge.hold(bytes))))
}

/// Experts on their way to their slots.
pub(super) enum PendingWeights<B: Backend> {
    Resident(FloatTensor<B>),
    Unsharding(Arc<Unshard>, Option<Repair<B>>),
}

/// Slots whose expert changed since the unshard was started.
pub(super) struct Repair<B: Backend> {
    pending: PendingTensor<B>,
    slots: Vec<usize>,
    _guard: UnshardedGuard,
}

/// The experts that the layout gives this rank: starts to unshard them, if nobody did so ahead. `weights` are this
/// rank's parameters, `[E, S]` or `[E / N, P]`.
pub(super) fn start_unshard<B: FsepKernels>(
    weights: &FloatTensor<B>,
    pass: &LayerPass,
    unshard: Option<&Arc<Unshard>>,
) -> Result<PendingWeights<B>, FsepError> {
    let spec = &pass.spec;
    let Some(unshard) = unshard else {
        return Ok(PendingWeights::Resident(cast::<B>(weights.clone(), spec.compute_dtype)));
    };
    unshard.start()?;
    let repair = match RepairPlan::new(&unshard.layout, &pass.dispatch.layout, spec.rank, spec.shard_len()) {
        None => None,
        Some(RepairPlan { exchange, slots }) => {
            let (operation, context) = (pass.operation("repair of changed slots"), &pass.context);
            let weights = cast::<B>(weights.clone(), spec.compute_dtype);
            let _guard = context.gauge.hold(exchange.recv_len * weights.dtype().size());
            let pending = B::fsep_start_exchange(weights, context.weights.as_ref(), operation, &exchange)?;
            Some(Repair { pending, slots, _guard })
        }
    };
    Ok(PendingWeights::Unsharding(unshard.clone(), repair))
}

impl<B: FsepKernels> PendingWeights<B> {
    /// Waits until the experts are there.
    pub fn wait(self, pass: &LayerPass) -> Result<ExpertWeights<B>, FsepError> {
        let (experts, spec) = (pass.experts(), &pass.spec);
        let (unshard, repair) = match self {
            PendingWeights::Resident(flat) => {
                let rows = experts.iter().map(|&expert| spec.resident_row(expert as usize)).collect();
                return Ok(ExpertWeights { flat, rows, shape: spec.shape, _guard: None });
            }
            PendingWeights::Unsharding(unshard, repair) => (unshard, repair),
        };
        let mut weights = match unshard.take::<Unsharding<B>>()? {
            Unsharding::Kept(weights) => weights,
            Unsharding::Travelling(pending, guard) => {
                let flat = pending.wait([experts.len(), spec.num_ranks * spec.shard_len()])?;
                let rows = (0..experts.len()).collect();
                ExpertWeights { flat, rows, shape: spec.shape, _guard: Some(guard) }
            }
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
        let changed = self.pending.wait([self.slots.len(), padded])?;
        let row = |i: usize| [Slice::from(i..i + 1), Slice::from(0..padded)];
        let place = |flat, (i, slot): (usize, usize)| {
            B::float_slice_assign(flat, &row(slot), B::float_slice(changed.clone(), &row(i)))
        };
        Ok(self.slots.into_iter().enumerate().fold(flat, place))
    }
}

/// Frees the experts of a forward pass, or keeps them for backward.
pub(super) fn end_forward<B: FsepKernels>(weights: ExpertWeights<B>, pass: &LayerPass) -> Result<(), FsepError> {
    match pass.unshards.as_ref().filter(|unshards| unshards.keep) {
        Some(unshards) => unshards.backward.keep(Unsharding::<B>::Kept(weights)),
        None => Ok(()),
    }
}

/// Frees the experts of a backward pass, or leaves them for the next batch.
pub(super) fn end_backward<B: FsepKernels>(weights: ExpertWeights<B>, pass: &LayerPass) -> Result<(), FsepError> {
    match pass.unshards.as_ref().and_then(|unshards| unshards.left.as_ref()) {
        Some(left) if left.is_planned() => left.keep(Unsharding::<B>::Kept(weights)),
        _ => Ok(()),
    }
}
