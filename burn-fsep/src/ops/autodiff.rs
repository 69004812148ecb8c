use std::sync::Arc;

use burn::backend::{
    Autodiff,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};

use super::{
    FsepKernels, FsepOps, MoeStep, RowIndices, Tracked,
    moe::{Saved, moe_backward, moe_forward},
};

#[derive(Debug)]
struct MoeBackward;

impl<B: FsepKernels> Backward<B, 3> for MoeBackward {
    type State = (Saved<B>, Arc<MoeStep>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [hidden, probs, weights] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (saved, step) = ops.state;
        let tracked = Tracked { hidden: hidden.is_some(), probs: probs.is_some(), weights: weights.is_some() };
        let gradients = moe_backward::<B>(grad, saved, &step, tracked);
        step.finished();
        for (node, gradient) in [(hidden, gradients.hidden), (probs, gradients.probs), (weights, gradients.weights)] {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: FsepKernels, C: CheckpointStrategy> FsepOps for Autodiff<B, C> {
    fn fsep_moe(
        hidden: FloatTensor<Self>,
        probs: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of: IntTensor<Self>,
        assignment_of: IntTensor<Self>,
        token_of: IntTensor<Self>,
        step: Arc<MoeStep>,
    ) -> FloatTensor<Self> {
        let rows = RowIndices::<B> { row_of, assignment_of, token_of };
        let nodes = [hidden.node(), probs.node(), weights.node()];
        let tracked = Tracked { hidden: hidden.is_tracked(), probs: probs.is_tracked(), weights: weights.is_tracked() };
        let (hidden, probs, weights) = (hidden.into_primitive(), probs.into_primitive(), weights.into_primitive());
        // Always `compute_bound`: backward restores the weights itself, at a time of its own choosing.
        match MoeBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let forward = moe_forward::<B>(hidden, probs, weights, rows, step.clone(), tracked);
                let saved = forward.saved.expect("a tracked operation saves what its backward needs");
                prep.finish((saved, step), forward.output)
            }
            OpsKind::UnTracked(prep) => {
                let forward = moe_forward::<B>(hidden, probs, weights, rows, step, Tracked::default());
                prep.finish(forward.output)
            }
        }
    }
}
