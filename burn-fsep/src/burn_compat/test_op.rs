//! An operation for contract tests: in forward it passes a tensor through, in backward it does what its state says.

use std::{fmt::Debug, marker::PhantomData};

use burn::{
    backend::{
        Autodiff, Flex,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
    },
    tensor::Tensor,
};

/// What the operation does in backward.
pub(super) trait OnBackward: Clone + Debug + Send + 'static {
    fn on_backward(ops: Ops<Self, 1>, grads: &mut Gradients);
}

#[derive(Debug)]
struct TestOp<S>(PhantomData<fn() -> S>);

impl<S: OnBackward> Backward<Flex, 1> for TestOp<S> {
    type State = S;

    fn backward(self, ops: Ops<S, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        S::on_backward(ops, grads);
    }
}

/// Passes a tensor through the operation.
pub(super) fn test_op<S: OnBackward>(tensor: Tensor<1>, state: S) -> Tensor<1> {
    let tensor = tensor.try_into_primitive::<Autodiff<Flex>>().unwrap();
    let op = TestOp::<S>(PhantomData);
    let output = match op.prepare::<NoCheckpointing>([tensor.node()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(state, tensor.into_primitive()),
        OpsKind::UnTracked(prep) => prep.finish(tensor.into_primitive()),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

/// Passes the output's gradient back.
pub(super) fn pass_back<S>(ops: &Ops<S, 1>, grads: &mut Gradients) {
    let gradient = grads.consume::<Flex>(&ops.node);
    if let [Some(parent)] = &ops.parents {
        grads.register::<Flex>(parent.id, gradient);
    }
}
