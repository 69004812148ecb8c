use std::sync::Arc;

use burn::tensor::DType;
use parking_lot::Mutex;

use super::{LayerSpec, RoutedDispatch, Unshard};
use crate::{
    FsepError, Timeline,
    comm::{Communicator, Operation},
    shard::UnshardedGauge,
    timeline::TimelineSpan,
};

/// Which inputs of a layer gradients are wanted for. Equal on all ranks, since collectives depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tracked {
    /// The layer's input.
    pub hidden: bool,
    /// The router's probabilities.
    pub probs: bool,
    /// The experts' parameters.
    pub weights: bool,
}

impl Tracked {
    /// Whether any gradient is wanted: whether this is a training pass.
    pub fn any(&self) -> bool {
        self.hidden || self.probs || self.weights
    }

    /// Whether backward computes with the experts.
    pub fn needs_experts_in_backward(&self) -> bool {
        self.hidden || self.weights
    }

    pub fn bits(&self) -> u32 {
        u32::from(self.hidden) | u32::from(self.probs) << 1 | u32::from(self.weights) << 2
    }

    /// What a rank's [`Tracked::bits`] mean, for messages.
    pub fn describe(bits: u32) -> String {
        let names = [(1, "the input"), (2, "the router"), (4, "the experts")];
        let wanted: Vec<_> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
        if wanted.is_empty() {
            "no gradients wanted".into()
        } else {
            format!("gradients wanted of {}", wanted.join(", "))
        }
    }
}

/// What all passes of a rank work with.
#[derive(Debug)]
pub struct RankContext {
    /// Carries tokens and their gradients.
    pub tokens: Arc<dyn Communicator>,
    /// Carries shards and their gradients.
    pub weights: Arc<dyn Communicator>,
    /// Carries gradients of shards to the ranks that have the same; `None` where there are no others.
    pub replicas: Option<Arc<dyn Communicator>>,
    /// Counts unsharded experts.
    pub gauge: UnshardedGauge,
    /// What ran when, if that is recorded.
    pub timeline: Option<Timeline>,
}

/// Work that is put off. It must not keep a pass alive.
pub type Deferred = Box<dyn FnOnce() -> Result<(), FsepError> + Send>;

/// Work that needs none of the experts: done while tokens travel to them in forward.
pub type BesideTokens = Box<dyn FnOnce() + Send>;

/// What the operations tell those who run and schedule them, which they do not know.
pub trait PassHost: std::fmt::Debug + Send + Sync {
    /// Backward of a pass begins. Returns the unshard of the pass whose backward comes next, to be started behind this one's
    /// compute.
    fn begin_backward(&self, pass: &LayerPass) -> Option<Arc<Unshard>>;

    /// Puts work off until the backward pass of another layer is under way, or backward ends.
    ///
    /// # Errors
    ///
    /// Those of work that was put off before, and of this one's where nothing is put off.
    fn defer(&self, work: Deferred) -> Result<(), FsepError>;

    /// Does what was put off.
    ///
    /// # Errors
    ///
    /// The work's.
    fn catch_up(&self) -> Result<(), FsepError>;

    /// Puts the wait for a mean over replicas off until gradients are collected. All are waited for in the order in which they were
    /// put off: large ones go on to a second exchange then, and autodiff collects in an order of its own.
    fn await_mean(&self, wait: Deferred);

    /// Waits for the means.
    ///
    /// # Errors
    ///
    /// Those of the waits.
    fn finish_means(&self) -> Result<(), FsepError>;

    /// Backward of a pass has run.
    fn end_backward(&self, pass: &LayerPass);

    /// Ends the group with an error, and the pass by unwinding.
    fn fail(&self, error: FsepError) -> !;
}

/// Everything that one rank has to know to run one pass of one layer, forward and backward.
pub struct LayerPass {
    pub spec: Arc<LayerSpec>,
    pub context: Arc<RankContext>,
    pub host: Box<dyn PassHost>,
    pub dispatch: RoutedDispatch,
    /// Unshards of this layer and of the one after; `None` where experts are resident.
    pub unshards: Option<Unshards>,
    /// Which gradients are wanted.
    pub tracked: Tracked,
    /// Type of the parameters and their gradients.
    pub param_dtype: DType,
    /// Taken when it is done.
    pub beside_tokens: Mutex<Option<BesideTokens>>,
}

impl std::fmt::Debug for LayerPass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerPass").field("spec", &self.spec).field("dispatch", &self.dispatch).finish_non_exhaustive()
    }
}

/// Unshards that belong to one pass of a layer with sharded experts.
#[derive(Debug)]
pub struct Unshards {
    /// For this forward pass; maybe started ahead, then maybe under a layout that was repaired since.
    pub forward: Arc<Unshard>,
    /// For the backward pass.
    pub backward: Arc<Unshard>,
    /// Of the layer after, to be started when this layer's tokens have come.
    pub next: Option<Arc<Unshard>>,
    /// The experts of the forward pass are kept for backward.
    pub keep: bool,
    /// For the layer's forward pass in the next batch: after backward, the experts are left in it.
    pub left: Option<Arc<Unshard>>,
}

impl LayerPass {
    /// A collective of this pass.
    pub fn operation(&self, name: &'static str) -> Operation {
        self.spec.operation(name).in_pass(self.dispatch.pass)
    }

    /// The unshard for backward, if backward will need one.
    pub fn backward_unshard(&self) -> Option<&Arc<Unshard>> {
        self.unshards.as_ref().filter(|_| self.tracked.needs_experts_in_backward()).map(|unshards| &unshards.backward)
    }

    /// Marks compute of this layer in the timeline, until it is dropped.
    pub fn span(&self, name: &'static str) -> Option<TimelineSpan> {
        self.context
            .timeline
            .as_ref()
            .and_then(|timeline| timeline.compute(format!("{name}, layer {}", self.spec.layer)))
    }

    /// Does what is to be done while tokens travel.
    pub fn work_beside_tokens(&self) {
        // Taken before it runs: the lock is not held meanwhile.
        let work = self.beside_tokens.lock().take();
        if let Some(work) = work {
            let _span = self.span("shared expert in forward");
            work();
        }
    }

    /// The experts of this rank by slot. Shape `[C]`.
    pub fn experts(&self) -> &[u32] {
        self.dispatch.layout.experts_of(self.spec.rank)
    }
}
