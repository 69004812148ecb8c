use std::sync::Arc;

use burn::tensor::Device;
use burn_fsep_planner::Topology;

use crate::{FsepError, FsepRuntime, FsepRuntimeConfig, Timeline, comm::Communicator};

/// A rank, as its program gets it.
#[derive(Clone)]
pub struct Rank {
    /// The communicator that it trains over.
    pub comm: Arc<dyn Communicator>,
    /// What it computes on, without autodiff.
    pub device: Device,
    /// Index of its GPU, if it computes on one.
    pub gpu: Option<usize>,
    /// Which ranks share a machine, if the launcher says.
    pub topology: Option<Topology>,
    /// Its timeline, if [`RankConfig::with_timeline`](super::RankConfig::with_timeline) asked for one.
    pub timeline: Option<Timeline>,
}

impl Rank {
    /// Whether this is rank 0, which prints and writes what is there once.
    pub fn is_first(&self) -> bool {
        self.comm.rank() == 0
    }

    /// This rank's runtime, with the topology and the timeline of the rank where `config` has none. Collective.
    ///
    /// # Errors
    ///
    /// Those of [`FsepRuntimeConfig::init`].
    pub fn runtime(&self, mut config: FsepRuntimeConfig) -> Result<FsepRuntime, FsepError> {
        if config.ranks_per_node.is_none() && config.topology.is_none() {
            config.topology.clone_from(&self.topology);
        }
        config.timeline = config.timeline.or_else(|| self.timeline.clone());
        config.init(self.comm.clone())
    }
}
