//! Attention and normalisation of LibTorch with their own backward passes, for benchmarks: Burn's autodiff computes both
//! with operations so small that they, not the layer under test, would fill the step.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, LibTorch,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::FloatTensor,
    },
    tensor::Tensor,
};
use burn_tch::TchTensor;

use crate::BackwardMark;

/// Causal attention. `[B, H, L, D / H]`, three times and once
pub fn attention(query: Tensor<4>, key: Tensor<4>, value: Tensor<4>) -> Tensor<4> {
    let output =
        <Dispatch as FusedOps>::fused_attention(query.into_dispatch(), key.into_dispatch(), value.into_dispatch());
    Tensor::from_dispatch(output)
}

/// RMS normalisation with a weight, `[D]`. `[T, D] -> [T, D]`
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, mark: BackwardMark) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_rms_norm(x.into_dispatch(), weight.into_dispatch(), mark))
}

/// Both operations, with autodiff.
#[backend_extension(LibTorch, Autodiff)]
pub trait FusedOps: Backend {
    /// [`attention`]
    fn fused_attention(query: FloatTensor<Self>, key: FloatTensor<Self>, value: FloatTensor<Self>)
    -> FloatTensor<Self>;

    /// [`rms_norm`]
    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, mark: BackwardMark) -> FloatTensor<Self>;
}

/// An operation that LibTorch differentiates by itself.
pub trait TorchOps: Backend {
    /// The output, and what [`TorchOps::differentiate`] needs.
    fn run<const N: usize>(
        inputs: [FloatTensor<Self>; N],
        function: fn(&[tch::Tensor]) -> tch::Tensor,
    ) -> Recorded<Self, N>;

    /// The output, out of LibTorch's graph.
    fn detached<const N: usize>(recorded: &Recorded<Self, N>) -> FloatTensor<Self>;

    /// Gradients of the inputs.
    fn differentiate<const N: usize>(recorded: Recorded<Self, N>, grad: FloatTensor<Self>) -> [FloatTensor<Self>; N];
}

/// Inputs and output of an operation, with LibTorch's graph between them.
#[derive(Debug, Clone)]
pub struct Recorded<B: Backend, const N: usize> {
    inputs: [FloatTensor<B>; N],
    output: FloatTensor<B>,
}

impl TorchOps for LibTorch {
    fn run<const N: usize>(inputs: [TchTensor; N], function: fn(&[tch::Tensor]) -> tch::Tensor) -> Recorded<Self, N> {
        let leaves = inputs.each_ref().map(|input| input.tensor.detach().set_requires_grad(true));
        let output = TchTensor::new(tch::with_grad(|| function(&leaves)));
        // With the storage that Burn counts the users of: it must not write over what LibTorch's graph needs.
        let mut storages = inputs.into_iter().map(|input| input.storage);
        let inputs = leaves.map(|leaf| match storages.next() {
            Some(storage) => TchTensor::from_existing(leaf, storage),
            None => TchTensor::new(leaf),
        });
        Recorded { inputs, output }
    }

    fn detached<const N: usize>(recorded: &Recorded<Self, N>) -> TchTensor {
        TchTensor::from_existing(recorded.output.tensor.detach(), recorded.output.storage.clone())
    }

    fn differentiate<const N: usize>(recorded: Recorded<Self, N>, grad: TchTensor) -> [TchTensor; N] {
        let Recorded { inputs, output } = recorded;
        // tch takes no gradient of an output: that of this product is `grad` times 1. In the order of the memory, since
        // attention's output has its heads inside the sequence there: nothing is copied.
        let swap_heads = !output.tensor.is_contiguous();
        let flat = |tensor: &tch::Tensor| match swap_heads {
            true => tensor.transpose(1, 2).flatten(0, -1),
            false => tensor.flatten(0, -1),
        };
        let sum = tch::with_grad(|| flat(&output.tensor).dot(&flat(&grad.tensor)));
        let leaves: Vec<_> = inputs.into_iter().map(|input| input.tensor).collect();
        let grads = tch::Tensor::run_backward(&[sum], &leaves, false, false);
        let grads: Vec<_> = grads.into_iter().map(TchTensor::new).collect();
        grads.try_into().expect("a gradient for each input")
    }
}

fn torch_attention(inputs: &[tch::Tensor]) -> tch::Tensor {
    let [query, key, value] = inputs else { unreachable!("three inputs are passed") };
    tch::Tensor::scaled_dot_product_attention(query, key, value, None::<&tch::Tensor>, 0.0, true, None, false)
}

fn torch_rms_norm(inputs: &[tch::Tensor]) -> tch::Tensor {
    let [x, weight] = inputs else { unreachable!("two inputs are passed") };
    x.internal_fused_rms_norm(x.size().last().copied().unwrap_or(1), Some(weight), 1e-6).0
}

impl FusedOps for LibTorch {
    fn fused_attention(query: TchTensor, key: TchTensor, value: TchTensor) -> TchTensor {
        Self::detached(&Self::run([query, key, value], torch_attention))
    }

    fn fused_rms_norm(x: TchTensor, weight: TchTensor, _mark: BackwardMark) -> TchTensor {
        Self::detached(&Self::run([x, weight], torch_rms_norm))
    }
}

#[derive(Debug)]
struct TorchBackward;

impl<B: TorchOps, const N: usize> Backward<B, N> for TorchBackward {
    type State = (Recorded<B, N>, Option<BackwardMark>);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (recorded, mark) = ops.state;
        mark.iter().for_each(BackwardMark::before);
        for (node, gradient) in ops.parents.into_iter().zip(B::differentiate(recorded, grad)) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
        mark.iter().for_each(BackwardMark::after);
    }
}

/// Runs `function` with autodiff.
macro_rules! differentiable {
    ($inputs:expr, $function:expr, $mark:expr) => {{
        let inputs = $inputs;
        let nodes = inputs.each_ref().map(|input| input.node());
        let recorded = B::run(inputs.map(|input| input.into_primitive()), $function);
        let output = B::detached(&recorded);
        match TorchBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((recorded, $mark), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }};
}

impl<B: TorchOps, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn fused_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        differentiable!([query, key, value], torch_attention, None)
    }

    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, mark: BackwardMark) -> FloatTensor<Self> {
        differentiable!([x, weight], torch_rms_norm, Some(mark))
    }
}
