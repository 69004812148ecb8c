use std::sync::Arc;

use burn::{
    backend::{
        Backend, Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

use super::{FsepKernels, MoeStep, RowIndices, Tracked, moe::moe_forward, weights};
use crate::{FsepError, FsepRuntime, schedule::Restore};

/// The MoE layer as an operation of a backend.
///
/// Every backend with [`FsepKernels`](super::FsepKernels) has it; what a backend can do better it replaces there. `Autodiff`
/// adds the backward pass.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"), Autodiff)]
pub trait FsepOps: Backend {
    /// A whole MoE layer after its router: permute, All-to-All, experts on restored weights, All-to-All back,
    /// weighted combine.
    ///
    /// It is one operation so that all its collectives run in one fixed order in forward and backward on every rank,
    /// also on ranks and slots without a token, and so that backward can restore the weights again instead of
    /// keeping them.
    ///
    /// - `hidden`: `[T, D]`
    /// - `probs`: `[T, K]`, the weight of each assignment
    /// - `weights`: `[E, S]` shards or `[E / N, P]` resident experts, as the step's [`WeightStorage`] says
    /// - `row_of`: `[T * K]`, the row of assignment `t * K + k` among the assignments sorted by expert
    /// - `assignment_of`: `[T * K]`, the inverse
    /// - `token_of`: `[T * K]`, the token of each row: `assignment_of / K`
    /// - result: `[T, D]`
    ///
    /// # Panics
    ///
    /// If a collective fails; [`MoeStep::runtime`] then holds the typed error, and
    /// [`FsepRuntime::run`](crate::FsepRuntime::run) returns it.
    ///
    /// [`WeightStorage`]: super::WeightStorage
    fn fsep_moe(
        hidden: FloatTensor<Self>,
        probs: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of: IntTensor<Self>,
        assignment_of: IntTensor<Self>,
        token_of: IntTensor<Self>,
        step: Arc<MoeStep>,
    ) -> FloatTensor<Self>;

    /// Starts to restore a layer's experts from this rank's shards, `[E, S]`, unless that was done already.
    ///
    /// # Errors
    ///
    /// As [`FsepKernels::fsep_start_exchange`](super::FsepKernels::fsep_start_exchange).
    fn fsep_start_restore(
        weights: FloatTensor<Self>,
        restore: Arc<Restore>,
        runtime: FsepRuntime,
    ) -> Result<(), FsepError>;
}

impl<B: FsepKernels> FsepOps for B {
    fn fsep_moe(
        hidden: FloatTensor<Self>,
        probs: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of: IntTensor<Self>,
        assignment_of: IntTensor<Self>,
        token_of: IntTensor<Self>,
        step: Arc<MoeStep>,
    ) -> FloatTensor<Self> {
        let rows = RowIndices { row_of, assignment_of, token_of };
        moe_forward::<B>(hidden, probs, weights, rows, step, Tracked::default()).output
    }

    fn fsep_start_restore(
        weights: FloatTensor<Self>,
        restore: Arc<Restore>,
        runtime: FsepRuntime,
    ) -> Result<(), FsepError> {
        weights::start::<B>(weights, &restore, &runtime)
    }
}

/// [`FsepOps::fsep_start_restore`] on the device of the shards.
pub(crate) fn start_restore(restore: &Arc<Restore>, runtime: &FsepRuntime) -> Result<(), FsepError> {
    let weights = restore.weights.clone().into_dispatch();
    <Dispatch as FsepOps>::fsep_start_restore(weights, restore.clone(), runtime.clone())
}

/// [`FsepOps::fsep_moe`] for tensors of any supported device.
///
/// # Panics
///
/// As [`FsepOps::fsep_moe`]; if the tensors' backend is not one that this crate was built for.
pub fn moe(
    hidden: Tensor<2>,
    probs: Tensor<2>,
    weights: Tensor<2>,
    row_of: Tensor<1, Int>,
    assignment_of: Tensor<1, Int>,
    token_of: Tensor<1, Int>,
    step: Arc<MoeStep>,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FsepOps>::fsep_moe(
        hidden.into_dispatch(),
        probs.into_dispatch(),
        weights.into_dispatch(),
        row_of.into_dispatch(),
        assignment_of.into_dispatch(),
        token_of.into_dispatch(),
        step,
    ))
}
