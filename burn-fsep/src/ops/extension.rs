use std::{any::Any, sync::Arc};

use burn::{
    backend::{
        Backend, Dispatch as AnyBackend, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

use burn_fsep_planner::Layout;

use super::{
    FsepKernels, LayerPass, Tracked, Unshard,
    expert_weights::{self, UnshardRequest},
    moe_pass::moe_forward,
    pass_rows::PassRows,
};
use crate::FsepError;

/// The MoE layer as an operation of a backend.
///
/// Every backend with [`FsepKernels`](super::FsepKernels) has it; what a backend can do better it replaces there. `Autodiff`
/// adds the backward pass.
#[backend_extension(Cube: cfg(feature = "cube"), Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"), Autodiff)]
pub trait FsepOps: Backend {
    /// A whole MoE layer after its router: permute, All-to-All, experts on unsharded weights, All-to-All back,
    /// weighted combine.
    ///
    /// It is one operation so that all its collectives run in one fixed order in forward and backward on every rank,
    /// also on ranks and slots without a token, and so that backward can unshard the weights again instead of
    /// keeping them.
    ///
    /// - `hidden`: `[T, D]`
    /// - `probs`: `[T, K]`, the weight of each assignment
    /// - `weights`: `[E, S]` shards or `[E / N, P]` resident experts, as the layer's [`WeightStorage`] says
    /// - `row_of`: `[T * K]`, the row of assignment `t * K + k` among the assignments sorted by expert
    /// - `assignment_of`: `[T * K]`, the inverse
    /// - `token_of`: `[T * K]`, the token of each row: `assignment_of / K`
    /// - in place of these three, where tokens travel once to a rank, those of [`RankRows`](super::RankRows): `row_of`,
    ///   `places` and `token_of`
    /// - result: `[T, D]`
    ///
    /// # Panics
    ///
    /// If a collective fails, with the typed error as payload; [`FsepRuntime::run`](crate::FsepRuntime::run) returns it.
    ///
    /// [`WeightStorage`]: super::WeightStorage
    fn fsep_moe(
        hidden: FloatTensor<Self>,
        probs: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of: IntTensor<Self>,
        assignment_of: IntTensor<Self>,
        token_of: IntTensor<Self>,
        pass: Arc<LayerPass>,
    ) -> FloatTensor<Self>;

    /// Starts to unshard a layer's experts from this rank's shards, `[E, S]`; returns what an [`Unshard`] holds then.
    ///
    /// # Errors
    ///
    /// As [`FsepKernels::fsep_start_exchange`](super::FsepKernels::fsep_start_exchange).
    fn fsep_start_unshard(
        weights: FloatTensor<Self>,
        request: UnshardRequest,
    ) -> Result<Box<dyn Any + Send>, FsepError>;
}

impl<B: FsepKernels> FsepOps for B {
    fn fsep_moe(
        hidden: FloatTensor<Self>,
        probs: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of: IntTensor<Self>,
        assignment_of: IntTensor<Self>,
        token_of: IntTensor<Self>,
        pass: Arc<LayerPass>,
    ) -> FloatTensor<Self> {
        let rows = PassRows::of_chunks(row_of, assignment_of, token_of, &pass);
        moe_forward::<B>(hidden, probs, weights, rows, &pass, Tracked::default()).output
    }

    fn fsep_start_unshard(
        weights: FloatTensor<Self>,
        request: UnshardRequest,
    ) -> Result<Box<dyn Any + Send>, FsepError> {
        expert_weights::start::<B>(weights, request)
    }
}

/// A planned [`Unshard`] under a layout of the shards `weights`, `[E, S]`, without autodiff, that starts on their device.
pub fn plan_unshard(request: UnshardRequest, layout: Arc<Layout>, weights: Tensor<2>) -> Arc<Unshard> {
    let operation = request.operation;
    let start = |weights: Tensor<2>| <AnyBackend as FsepOps>::fsep_start_unshard(weights.into_dispatch(), request);
    Arc::new(Unshard::new(operation, layout, weights, Box::new(start)))
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
    pass: Arc<LayerPass>,
) -> Tensor<2> {
    Tensor::from_dispatch(<AnyBackend as FsepOps>::fsep_moe(
        hidden.into_dispatch(),
        probs.into_dispatch(),
        weights.into_dispatch(),
        row_of.into_dispatch(),
        assignment_of.into_dispatch(),
        token_of.into_dispatch(),
        pass,
    ))
}
