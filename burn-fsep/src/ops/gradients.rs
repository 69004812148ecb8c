//! Gradients of whole experts on their way back to the shards.

use std::{fmt, sync::Arc};

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::DType,
};
use parking_lot::Mutex;

use super::{
    FsepKernels, LayerPass,
    replica_mean::PendingMean,
    tensor_exchange::{PendingTensor, Received},
    types::cast,
};
use crate::{FsepError, shard::sum_replicas};

/// Gradients that were started on their way and not waited for yet.
pub(super) enum PendingGradient<B: Backend> {
    Resident(FloatTensor<B>),
    Resharding(PendingTensor<B>, burn::backend::tensor::Device<B>),
}

/// The type in which gradients are summed: that of the parameters, but for half precision whose mean over replicas is still to come.
fn sum_dtype(pass: &LayerPass) -> DType {
    match (&pass.context.replicas, pass.param_dtype) {
        (Some(_), DType::F16 | DType::BF16) => DType::F32,
        (_, dtype) => dtype,
    }
}

/// Starts to return the slots' gradients, shaped as [`ExpertWeights::flat`](super::types::ExpertWeights::flat), to the shards.
///
/// The result is the gradient of the mean of the losses of the ranks that share the experts, hence the division by `N`.
pub(super) fn start_reshard<B: FsepKernels>(
    gradients: FloatTensor<B>,
    pass: &LayerPass,
) -> Result<PendingGradient<B>, FsepError> {
    if pass.spec.is_sharded() {
        let device = gradients.device();
        let (operation, plan) = (pass.operation("gradient reshard"), &pass.dispatch.unshard.reshard);
        let pending = B::fsep_start_exchange(gradients, pass.context.weights.as_ref(), operation, plan)?;
        return Ok(PendingGradient::Resharding(pending, device));
    }
    let gradients = cast::<B>(gradients, Some(sum_dtype(pass).into()));
    Ok(PendingGradient::Resident(match pass.spec.num_ranks {
        1 => gradients,
        ranks => B::float_mul_scalar(gradients, (1.0 / ranks as f64).into()),
    }))
}

impl<B: FsepKernels> PendingGradient<B> {
    /// Waits for the other ranks' parts and sums them over the slots of an expert. `[E, S]`, or `[E / N, P]` of resident experts.
    pub fn wait(self, pass: &LayerPass) -> Result<FloatTensor<B>, FsepError> {
        match self {
            PendingGradient::Resident(gradient) => Ok(gradient),
            PendingGradient::Resharding(pending, device) => {
                let (shard_len, scale) = (pass.spec.shard_len(), 1.0 / pass.spec.num_ranks as f64);
                let (layout, to) = (&pass.dispatch.layout, sum_dtype(pass));
                match pending.wait_raw()? {
                    Received::Host(bytes, dtype) => {
                        let sums = sum_replicas(&bytes, dtype, layout, shard_len, scale, to);
                        Ok(B::float_from_data(sums, &device))
                    }
                    Received::Device(received) => B::fsep_sum_replicas(received, layout, shard_len, scale, to.into()),
                }
            }
        }
    }
}

/// Where a layer's backward pass leaves the gradient of its shards for the end of backward.
#[derive(Debug)]
pub(super) struct GradientSlot<B: Backend> {
    pub pass: Arc<LayerPass>,
    state: Mutex<GradientState<B>>,
}

enum GradientState<B: Backend> {
    Absent,
    Pending(PendingGradient<B>),
    /// Under way to the ranks that have the same shards.
    Averaging(PendingMean<B>),
    Ready(FloatTensor<B>),
}

impl<B: Backend> fmt::Debug for GradientState<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GradientState::Absent => "Absent",
            GradientState::Pending(_) => "Pending",
            GradientState::Averaging(_) => "Averaging",
            GradientState::Ready(_) => "Ready",
        })
    }
}

impl<B: FsepKernels> GradientSlot<B> {
    pub fn new(pass: Arc<LayerPass>) -> Arc<Self> {
        Arc::new(Self { pass, state: Mutex::new(GradientState::Absent) })
    }

    /// Takes the gradient on its way; it is waited for now, or behind the backward pass of the layer before.
    pub fn set(self: &Arc<Self>, pending: PendingGradient<B>) -> Result<(), FsepError> {
        *self.state.lock() = GradientState::Pending(pending);
        if !self.pass.spec.is_sharded() {
            return self.finish();
        }
        // Weak: who puts it off must not keep the pass alive.
        let slot = Arc::downgrade(self);
        self.pass.host.defer(Box::new(move || slot.upgrade().map_or(Ok(()), |slot| slot.finish())))
    }

    fn finish(self: &Arc<Self>) -> Result<(), FsepError> {
        let mut state = self.state.lock();
        let finished = match std::mem::replace(&mut *state, GradientState::Absent) {
            GradientState::Pending(pending) => {
                let gradient = pending.wait(&self.pass)?;
                match &self.pass.context.replicas {
                    None => GradientState::Ready(gradient),
                    Some(replicas) => {
                        let (operation, slot) = (self.pass.operation("expert gradients"), Arc::downgrade(self));
                        let wait = move || slot.upgrade().map_or(Ok(()), |slot| slot.finish_mean());
                        self.pass.host.await_mean(Box::new(wait));
                        GradientState::Averaging(PendingMean::start(gradient, replicas.clone(), operation)?)
                    }
                }
            }
            other => other,
        };
        *state = finished;
        Ok(())
    }

    fn finish_mean(&self) -> Result<(), FsepError> {
        let mut state = self.state.lock();
        let finished = match std::mem::replace(&mut *state, GradientState::Absent) {
            GradientState::Averaging(mean) => {
                GradientState::Ready(cast::<B>(mean.wait()?, Some(self.pass.param_dtype.into())))
            }
            other => other,
        };
        *state = finished;
        Ok(())
    }

    /// The gradient, if the layer's backward pass left one.
    pub fn take(self: &Arc<Self>) -> Result<Option<FloatTensor<B>>, FsepError> {
        self.pass.host.catch_up()?;
        self.finish()?;
        self.pass.host.finish_means()?;
        Ok(match std::mem::replace(&mut *self.state.lock(), GradientState::Absent) {
            GradientState::Ready(gradient) => Some(gradient),
            _ => None,
        })
    }
}
