use std::{
    any::Any,
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use burn_fsep_planner::PlannerError;
use thiserror::Error;

use crate::{checkpoint::CheckpointError, comm::CommError, hub::HubError};

/// What can go wrong in `burn-fsep`.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum FsepError {
    /// A collective did not complete.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// The planner refused its input.
    #[error(transparent)]
    Planner(#[from] PlannerError),
    /// A checkpoint could not be saved or loaded.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A model folder could not be read or written.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A configuration that cannot work.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// A tensor of the wrong shape or type.
    #[error("{what}: expected {expected}, got {actual}")]
    Shape {
        /// The tensor.
        what: String,
        /// What was expected.
        expected: String,
        /// What came.
        actual: String,
    },
    /// Ranks entered a layer with different ideas of it; found before anything is computed.
    #[error("ranks disagree on {what} of layer {layer}: rank {rank} has {ours}, rank {peer} has {theirs}")]
    Divergence {
        /// What differs.
        what: &'static str,
        /// The layer.
        layer: usize,
        /// This rank.
        rank: usize,
        /// This rank's value.
        ours: String,
        /// The other rank.
        peer: usize,
        /// The other rank's value.
        theirs: String,
    },
    /// A token has no expert, because the router's logits are no numbers. Found on all ranks alike.
    #[error(
        "the router of rank {rank} found no expert for some token in layer {layer}: its logits are not finite. Training \
         diverged, or a batch has values that are not finite: look at the rank's batch, its loss and the gradient norm of \
         the steps before, and at the layer's input and router weight"
    )]
    NoExpert {
        /// The layer.
        layer: usize,
        /// The rank whose router it is.
        rank: usize,
    },
    /// An unshard was used in a way that its state does not allow: a pass ran twice, or this crate has a bug.
    #[error("`{operation}` cannot be {action}: it is {state}")]
    Unshard {
        /// The unshard.
        operation: String,
        /// What was to be done.
        action: &'static str,
        /// The state that it is in.
        state: &'static str,
    },
    /// A backend does not do what this crate relies on, or a model changed its backend within a step.
    #[error("the backend cannot complete `{operation}`: {reason}")]
    Backend {
        /// What it was to do.
        operation: String,
        /// What is wrong.
        reason: String,
    },
    /// The device is of a backend that this build has no operations for.
    #[error(
        "burn-fsep has no operations for the device {device}: this build has those of {backends}. Use a device of these, or \
         build burn-fsep with the feature of another backend"
    )]
    UnsupportedDevice {
        /// The device.
        device: String,
        /// The backends that this build of the crate has.
        backends: String,
    },
    /// The device, or what works on it, failed.
    #[error("the device failed: {0}")]
    Device(String),
    /// The gradients cannot be clipped nor trained with. Found on all ranks alike.
    #[error(
        "the gradient norm of optimizer step {step} is {norm}: training diverged, or a batch has values that are not \
         finite. Nothing was changed by this step; look at its data and loss, or go on from a checkpoint with a lower \
         learning rate"
    )]
    GradientNorm {
        /// The optimizer step of the training, from 1; counted on from a checkpoint of this crate's.
        step: u64,
        /// Its norm, which is not finite.
        norm: f64,
    },
    /// Replicated parameters, which have to be equal on all ranks, are not.
    #[error("the replicated parameter `{parameter}` has other values on {} than on rank 0: {hint}", ranks_of(ranks))]
    ReplicasDiffer {
        /// The first of them, by its path in the model.
        parameter: String,
        /// The ranks whose values are not rank 0's.
        ranks: Vec<usize>,
        /// What was forgotten.
        hint: &'static str,
    },
    /// An optimizer whose state cannot be cut over ranks ([`ShardedOptimizer`](crate::train::ShardedOptimizer)): it does not step a
    /// parameter element by element.
    #[error("the optimizer state of `{parameter}` cannot be cut over ranks: {reason}")]
    ShardedOptimizer {
        /// The parameter, by its path in the model.
        parameter: String,
        /// What was seen.
        reason: String,
    },
    /// An optimizer that cannot step experts matrix by matrix
    /// ([`WholeMatrixOptimizer`](crate::train::WholeMatrixOptimizer)).
    #[error("the experts `{parameter}` cannot be stepped matrix by matrix: {reason}")]
    WholeMatrixOptimizer {
        /// The experts' parameter, by its path in the model.
        parameter: String,
        /// What was seen.
        reason: String,
    },
    /// An optimizer that does not step experts element by element: a rank has shards of them, and no matrix or whole tensor.
    #[error(
        "the optimizer does not step the experts `{parameter}` element by element, but a rank has only its shards of them; \
         `WholeMatrixOptimizer` steps them matrix by matrix, and `max_grad_norm` clips by the norm of all gradients: {reason}"
    )]
    ExpertOptimizer {
        /// The experts, by their path in the model.
        parameter: String,
        /// What was seen.
        reason: String,
    },
    /// The step panicked, for a reason of its own.
    #[error("the step panicked: {0}")]
    Panicked(String),
    /// This rank's Learner stopped on an error of its own, for example of its data.
    #[error("the Learner stopped: {0}")]
    Learner(String),
    /// A training callback failed, for a reason of its own.
    #[error("training callback: {0}")]
    Callback(String),
}

thread_local! {
    /// How many [`catch`] of this thread are under way.
    static CATCHING: Cell<usize> = const { Cell::new(0) };
}

/// Runs `step`; what unwinds it comes back, be it a panic's payload or an [`FsepError`] that was thrown.
pub(crate) fn catch<T>(step: impl FnOnce() -> T) -> Result<T, Box<dyn Any + Send>> {
    CATCHING.set(CATCHING.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(step));
    CATCHING.set(CATCHING.get() - 1);
    result
}

/// Unwinds with the error as payload, which prints nothing, where [`catch`] waits for it; elsewhere panics with its message.
pub(crate) fn throw(error: FsepError, rank: usize) -> ! {
    if CATCHING.get() > 0 {
        resume_unwind(Box::new(error));
    }
    panic!("rank {rank}: {error}")
}

/// "rank 3" or "ranks 1, 3".
fn ranks_of(ranks: &[usize]) -> String {
    let names = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    if ranks.len() == 1 { format!("rank {names}") } else { format!("ranks {names}") }
}
