use std::{any::Any, sync::Arc};

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
    FsepKernels, FsepOps, LayerPass, Tracked,
    expert_weights::UnshardRequest,
    gradients::GradientSlot,
    moe_pass::{Saved, moe_backward, moe_forward},
    pass_rows::PassRows,
};
use crate::FsepError;

#[derive(Debug)]
struct MoeBackward;

impl<B: FsepKernels> Backward<B, 3> for MoeBackward {
    type State = (Saved<B>, Arc<GradientSlot<B>>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [hidden, probs, weights] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (saved, slot) = ops.state;
        let pass = &slot.pass;
        let tracked = Tracked { hidden: hidden.is_some(), probs: probs.is_some(), weights: weights.is_some() };
        let gradients = moe_backward::<B>(grad, saved, pass, tracked);
        pass.host.end_backward(pass);
        for (node, gradient) in [(hidden, gradients.hidden), (probs, gradients.probs)] {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<B>(node.id, gradient);
            }
        }
        if let Some(pending) = gradients.weights {
            slot.set(pending).unwrap_or_else(|error| pass.host.fail(error));
        }
    }
}

/// Passes the shards through. Burn runs what depends on nothing but a parameter at the very end of backward
/// (`burn_compat::backward_order`): there the gradients that travelled meanwhile are collected.
#[derive(Debug)]
struct CollectGradient;

impl<B: FsepKernels> Backward<B, 1> for CollectGradient {
    type State = Arc<GradientSlot<B>>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let ([weights], slot) = (ops.parents, ops.state);
        let gradient = slot.take().unwrap_or_else(|error| slot.pass.host.fail(error));
        if let (Some(node), Some(gradient)) = (weights, gradient) {
            grads.register::<B>(node.id, gradient);
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
        pass: Arc<LayerPass>,
    ) -> FloatTensor<Self> {
        let rows = PassRows::<B>::of_chunks(row_of, assignment_of, token_of, &pass);
        let slot = GradientSlot::<B>::new(pass.clone());
        let leaf = weights.node();
        let weights = match CollectGradient.prepare::<C>([leaf]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(slot.clone(), weights.into_primitive()),
            OpsKind::UnTracked(prep) => prep.finish(weights.into_primitive()),
        };
        let nodes = [hidden.node(), probs.node(), weights.node()];
        let tracked = Tracked { hidden: hidden.is_tracked(), probs: probs.is_tracked(), weights: weights.is_tracked() };
        let (hidden, probs, weights) = (hidden.into_primitive(), probs.into_primitive(), weights.into_primitive());
        // Always `compute_bound`: backward unshards the weights itself, at a time of its own choosing.
        match MoeBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let forward = moe_forward::<B>(hidden, probs, weights, rows, &pass, tracked);
                let saved = forward.saved.expect("a tracked operation saves what its backward needs");
                prep.finish((saved, slot), forward.output)
            }
            OpsKind::UnTracked(prep) => {
                let forward = moe_forward::<B>(hidden, probs, weights, rows, &pass, Tracked::default());
                prep.finish(forward.output)
            }
        }
    }

    fn fsep_start_unshard(
        weights: FloatTensor<Self>,
        request: UnshardRequest,
    ) -> Result<Box<dyn Any + Send>, FsepError> {
        B::fsep_start_unshard(weights.into_primitive(), request)
    }
}
