//! Gradients of whole experts on their way back to the shards.

use std::{fmt, sync::Arc};

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{FloatDType, Shape, Slice},
};
use burn_fsep_planner::Layout;
use parking_lot::Mutex;

use super::{
    FsepKernels, MoeStep, WeightStorage,
    exchange::{PendingTensor, Received},
    weights::cast,
};
use crate::{FsepError, shard::sum_replicas};

/// Gradients that were started on their way and not waited for yet.
pub(super) enum PendingGradient<B: Backend> {
    Resident(FloatTensor<B>),
    Resharding(PendingTensor<B>, burn::backend::tensor::Device<B>),
}

/// Starts to return the slots' gradients, shaped as [`ExpertWeights::flat`](super::ExpertWeights::flat), to the shards.
///
/// The result is the gradient of the mean over ranks of their losses, hence the division by `N`.
pub(super) fn start_reshard<B: FsepKernels>(
    gradients: FloatTensor<B>,
    step: &MoeStep,
) -> Result<PendingGradient<B>, FsepError> {
    match step.storage {
        WeightStorage::Resident => {
            let gradients = cast::<B>(gradients, Some(step.param_dtype.into()));
            let ranks = step.world_size();
            let scaled = match ranks {
                1 => gradients,
                _ => B::float_mul_scalar(gradients, (1.0 / ranks as f64).into()),
            };
            Ok(PendingGradient::Resident(scaled))
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

impl<B: FsepKernels> PendingGradient<B> {
    /// Waits for the other ranks' parts and sums them over replicas. `[E, S]`, or `[E / N, P]` of resident experts.
    pub fn wait(self, step: &MoeStep) -> Result<FloatTensor<B>, FsepError> {
        match self {
            PendingGradient::Resident(gradient) => Ok(gradient),
            PendingGradient::Resharding(pending, device) => {
                let ranks = step.world_size();
                let (shard_len, scale) = (step.shape.shard_len(ranks), 1.0 / ranks as f64);
                match pending.wait_raw()? {
                    Received::Host(bytes, dtype) => {
                        let sums = sum_replicas(&bytes, dtype, &step.layout, shard_len, scale, step.param_dtype);
                        Ok(B::float_from_data(sums, &device))
                    }
                    Received::Device(received) => {
                        B::fsep_sum_replicas(received, &step.layout, shard_len, scale, step.param_dtype.into())
                    }
                }
            }
        }
    }
}

/// [`sum_replicas`] without leaving the device: `[N * C * S] -> [E, S]`, in rank order, half precision summed in single.
pub(super) fn sum_on_device<B: Backend>(
    received: FloatTensor<B>,
    layout: &Layout,
    shard_len: usize,
    scale: f64,
    to: FloatDType,
) -> FloatTensor<B> {
    let dtype: FloatDType = received.dtype().into();
    let wide = if matches!(dtype, FloatDType::BF16 | FloatDType::F16) { FloatDType::F32 } else { dtype };
    let device = received.device();
    let experts = layout.num_experts();
    let mut sums: Vec<Option<FloatTensor<B>>> = vec![None; experts];
    for (slot, &expert) in layout.as_slice().iter().enumerate() {
        let part = B::float_slice(received.clone(), &[Slice::from(slot * shard_len..(slot + 1) * shard_len)]);
        let part = cast::<B>(part, Some(wide));
        let sum = &mut sums[expert as usize];
        *sum = Some(match sum.take() {
            Some(sum) => B::float_add(sum, part),
            None => part,
        });
    }
    let scaled = |sum: Option<FloatTensor<B>>| match sum {
        Some(sum) => cast::<B>(B::float_mul_scalar(sum, scale.into()), Some(to)),
        None => B::float_zeros(Shape::new([shard_len]), &device, to),
    };
    let sums = sums.into_iter().map(scaled).collect();
    B::float_reshape(B::float_cat(sums, 0), Shape::new([experts, shard_len]))
}

/// Where a layer's backward pass leaves the gradient of its shards for the end of backward.
#[derive(Debug)]
pub(super) struct GradientSlot<B: Backend> {
    pub step: Arc<MoeStep>,
    state: Mutex<GradientState<B>>,
}

enum GradientState<B: Backend> {
    Absent,
    Pending(PendingGradient<B>),
    Ready(FloatTensor<B>),
}

impl<B: Backend> fmt::Debug for GradientState<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GradientState::Absent => "Absent",
            GradientState::Pending(_) => "Pending",
            GradientState::Ready(_) => "Ready",
        })
    }
}

impl<B: FsepKernels> GradientSlot<B> {
    pub fn new(step: Arc<MoeStep>) -> Arc<Self> {
        Arc::new(Self { step, state: Mutex::new(GradientState::Absent) })
    }

    /// Takes the gradient on its way; it is waited for now, or behind the backward pass of the layer before.
    pub fn put(self: &Arc<Self>, pending: PendingGradient<B>) -> Result<(), FsepError> {
        *self.state.lock() = GradientState::Pending(pending);
        let schedule = self.step.runtime.schedule();
        if self.step.storage == WeightStorage::Resident || !schedule.config().delay_reshard {
            return self.finish();
        }
        // Weak: the runtime must not keep its own handle in the step alive.
        let slot = Arc::downgrade(self);
        schedule.defer(Box::new(move || slot.upgrade().map_or(Ok(()), |slot| slot.finish())))
    }

    fn finish(&self) -> Result<(), FsepError> {
        let mut state = self.state.lock();
        let finished = match std::mem::replace(&mut *state, GradientState::Absent) {
            GradientState::Pending(pending) => GradientState::Ready(pending.wait(&self.step)?),
            other => other,
        };
        *state = finished;
        Ok(())
    }

    /// The gradient, if the layer's backward pass left one.
    pub fn take(&self) -> Result<Option<FloatTensor<B>>, FsepError> {
        self.step.runtime.schedule().catch_up()?;
        self.finish()?;
        Ok(match std::mem::replace(&mut *self.state.lock(), GradientState::Absent) {
            GradientState::Ready(gradient) => Some(gradient),
            _ => None,
        })
    }
}
