use std::{fmt, sync::Arc};

use burn_fsep_planner::{Topology, repair::LayoutRepair};
use parking_lot::RwLock;

use super::{
    FsepRuntimeConfig, TokenRows, dispatcher_factory::DispatcherFactory, layer_state::LayerState,
    observed_steps::ObservedSteps, outputs::Outputs,
};
use crate::{
    FsepError, Timeline,
    comm::{Communicator, Groups, local::LocalCommunicator},
    ops::RankContext,
    schedule::Schedule,
    shard::UnshardedGauge,
};

/// A rank's runtime, shared by its FSEP layers. Cloning gives another handle on the same runtime.
#[derive(Clone)]
pub struct FsepRuntime {
    pub(super) inner: Arc<Inner>,
    /// Not a part of `inner`: an output holds its autodiff graph, which holds `inner`.
    pub(super) outputs: Arc<Outputs>,
}

pub(super) struct Inner {
    /// Counts, flags.
    pub groups: Groups,
    /// Gradients of replicated parameters.
    dense: Arc<dyn Communicator>,
    /// What the passes of all layers work with.
    pub context: Arc<RankContext>,
    /// Of the ranks that share the experts.
    pub topology: Topology,
    seed: u64,
    pub dispatcher: DispatcherFactory,
    pub repair: Option<LayoutRepair>,
    pub token_rows: TokenRows,
    pub token_chunks: usize,
    pub layers: RwLock<Vec<Arc<LayerState>>>,
    pub schedule: Schedule,
    pub observed: ObservedSteps,
}

impl fmt::Debug for FsepRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FsepRuntime(rank {} of {}, {} layers)", self.rank(), self.world_size(), self.num_layers())
    }
}

impl FsepRuntime {
    /// A runtime with default configuration; see [`FsepRuntimeConfig`]. Collective.
    ///
    /// # Errors
    ///
    /// As [`FsepRuntimeConfig::init`].
    pub fn new(comm: Arc<dyn Communicator>) -> Result<Self, FsepError> {
        FsepRuntimeConfig::new().init(comm)
    }

    /// The runtime of a single rank, for training without peers and for inference.
    pub fn single() -> Self {
        let comm = Arc::new(LocalCommunicator::single());
        Self::new(comm).expect("a group of one has nobody to disagree with")
    }

    pub(super) fn from_parts(
        groups: Groups,
        topology: Topology,
        repair: Option<LayoutRepair>,
        config: &FsepRuntimeConfig,
    ) -> Result<Self, FsepError> {
        let [world, experts, replicas] = [groups.world(), groups.experts(), groups.replicas()];
        let context = RankContext {
            tokens: experts.duplicate("tokens")?,
            weights: experts.duplicate_in_background("weights")?,
            replicas: match replicas.size() {
                1 => None,
                _ => Some(replicas.duplicate_in_background("expert gradients")?),
            },
            gauge: UnshardedGauge::default(),
            timeline: config.timeline.clone(),
        };
        let inner = Inner {
            context: Arc::new(context),
            dense: world.duplicate_in_background("dense gradients")?,
            groups,
            topology,
            seed: config.seed,
            dispatcher: config.dispatcher.clone(),
            repair,
            token_rows: config.token_rows,
            token_chunks: config.token_chunks,
            layers: RwLock::default(),
            schedule: Schedule::new(config.schedule),
            observed: ObservedSteps::default(),
        };
        Ok(Self { inner: Arc::new(inner), outputs: Arc::default() })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.comm().rank()
    }

    /// World size `W`.
    pub fn world_size(&self) -> usize {
        self.comm().size()
    }

    /// This rank's groups: all ranks, those that it shares experts with, and those that have the same shards.
    pub fn groups(&self) -> &Groups {
        &self.inner.groups
    }

    /// The ranks that share the experts, and their nodes.
    pub fn topology(&self) -> &Topology {
        &self.inner.topology
    }

    /// The seed of initial values.
    pub fn seed(&self) -> u64 {
        self.inner.seed
    }

    /// The communicator of all ranks, for counts and flags; also for collectives of the user's own, as long as
    /// all ranks call them in the same order.
    pub fn comm(&self) -> &dyn Communicator {
        self.inner.groups.world().as_ref()
    }

    /// For gradients of replicated parameters, which travel while backward runs.
    pub(crate) fn dense_comm(&self) -> &Arc<dyn Communicator> {
        &self.inner.dense
    }

    /// For gradients of shards, among the ranks that have the same; `None` where there are no others.
    pub(crate) fn shards_comm(&self) -> Option<&Arc<dyn Communicator>> {
        self.inner.context.replicas.as_ref()
    }

    /// The record of what ran when, if one is kept.
    pub fn timeline(&self) -> Option<&Timeline> {
        self.inner.context.timeline.as_ref()
    }

    /// Counts the bytes of unsharded expert weights alive on this rank.
    pub fn unsharded_gauge(&self) -> &UnshardedGauge {
        &self.inner.context.gauge
    }

    /// A handle for what an autodiff graph holds: it has no outputs, which would hold the graph.
    pub(crate) fn for_graph(&self) -> Self {
        Self { inner: self.inner.clone(), outputs: Arc::default() }
    }
}
