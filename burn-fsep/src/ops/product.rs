//! Products of matrices outside the experts: the router's, and those of a shared expert.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch as AnyBackend,
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

use super::{FsepKernels, Transposed};

/// A product of two matrices as an operation of a backend. `Autodiff` adds the backward pass.
#[backend_extension(Cube: cfg(feature = "cube"), Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"), Autodiff)]
pub trait ProductOps: Backend {
    /// `left * right`, of one type. `([R, W], [W, C]) -> [R, C]`
    fn fsep_product(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl<B: FsepKernels> ProductOps for B {
    fn fsep_product(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        B::fsep_multiply(left, right, Transposed::Neither)
    }
}

#[derive(Debug)]
struct ProductBackward;

impl<B: FsepKernels> Backward<B, 2> for ProductBackward {
    /// Each factor, if the other one's gradient is wanted.
    type State = [Option<FloatTensor<B>>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let ([left_node, right_node], [left, right]) = (ops.parents, ops.state);
        if let (Some(node), Some(right)) = (left_node, right) {
            grads.register::<B>(node.id, B::fsep_multiply(grad.clone(), right, Transposed::Right));
        }
        if let (Some(node), Some(left)) = (right_node, left) {
            grads.register::<B>(node.id, B::fsep_multiply(left, grad, Transposed::Left));
        }
    }
}

impl<B: FsepKernels, C: CheckpointStrategy> ProductOps for Autodiff<B, C> {
    fn fsep_product(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [left.node(), right.node()];
        let [is_left, is_right] = [left.is_tracked(), right.is_tracked()];
        let (left, right) = (left.into_primitive(), right.into_primitive());
        match ProductBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let kept = [is_right.then(|| left.clone()), is_left.then(|| right.clone())];
                prep.finish(kept, B::fsep_product(left, right))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::fsep_product(left, right)),
        }
    }
}

/// [`ProductOps::fsep_product`] of tensors of any supported device: Burn's own product, but where the backend has a better one. On
/// CUDA that is cuBLAS's, which in single precision does not round to TF32 as CubeCL's does.
///
/// # Panics
///
/// If the shapes do not fit, or the tensors' backend is not one that this crate was built for.
pub fn product(left: Tensor<2>, right: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<AnyBackend as ProductOps>::fsep_product(left.into_dispatch(), right.into_dispatch()))
}
