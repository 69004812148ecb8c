use std::sync::Arc;

use burn_fsep_planner::{
    PlannerStrategy, Topology,
    dispatch::Dispatcher,
    repair::{LayoutRepair, RepairConfig},
};
use derive_new::new;

use super::{FsepRuntime, TokenRows, dispatcher_factory::DispatcherFactory};
use crate::{
    FsepError, ScheduleConfig, Timeline,
    comm::{Communicator, Groups, Operation, agree, digest},
};

/// Configuration of a rank's [`FsepRuntime`]; equal on all ranks.
#[derive(new, Debug, Clone)]
pub struct FsepRuntimeConfig {
    /// Ranks per node `G`; all ranks on one node if `None`.
    #[new(default)]
    pub ranks_per_node: Option<usize>,
    /// How many ranks share the experts, `N`; all if `None`.
    #[new(default)]
    pub expert_parallel_size: Option<usize>,
    /// Which ranks share a node, in place of `ranks_per_node`.
    #[new(default)]
    pub topology: Option<Topology>,
    /// Seed of the experts' and routers' initial values.
    #[new(default)]
    pub seed: u64,
    #[new(default)]
    pub(super) dispatcher: DispatcherFactory,
    /// Repairs layouts in the step itself, once its counts are known; `None` for no repairs. By default repairs count as
    /// free, which is right where weights are unsharded after the counts are known; where experts are prefetched in forward,
    /// only the changed slots are unsharded once more.
    #[new(value = "Some(RepairConfig::free())")]
    pub repair: Option<RepairConfig>,
    /// Which communication is moved behind compute.
    #[new(default)]
    pub schedule: ScheduleConfig,
    /// How tokens travel between ranks.
    #[new(default)]
    pub token_rows: TokenRows,
    /// In how many chunks the tokens of a pass go through a layer.
    #[new(value = "1")]
    pub token_chunks: usize,
    /// Records what runs when; this rank's own.
    #[new(default)]
    pub timeline: Option<Timeline>,
}

/// Each costs a sort, a dispatch and its counts, also where it is empty.
const MAX_TOKEN_CHUNKS: usize = 1024;

impl Default for FsepRuntimeConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl FsepRuntimeConfig {
    /// Sets the number of ranks on a node: tokens prefer experts of their own node. The last node takes what remains.
    pub fn with_ranks_per_node(mut self, ranks_per_node: usize) -> Self {
        self.ranks_per_node = Some(ranks_per_node);
        self
    }

    /// Sets how many ranks share the experts (all by default): each `N` ranks that follow one another are a group with shards of
    /// every expert and layouts of its own, and the `W / N` groups are replicas of one another, whose gradients are averaged. So the
    /// All-to-Alls stay among `N` ranks, as of one node with fast links, and a rank has `1 / N` of all experts.
    pub fn with_expert_parallel_size(mut self, ranks: usize) -> Self {
        self.expert_parallel_size = Some(ranks);
        self
    }

    /// Sets which ranks share a node, for nodes of different sizes: `Topology::new(&[4, 3])?` has ranks 0 to 3 on one node
    /// and 4 to 6 on another. Not together with [`with_ranks_per_node`](Self::with_ranks_per_node).
    pub fn with_topology(mut self, topology: Topology) -> Self {
        self.topology = Some(topology);
        self
    }

    /// Sets the seed of initial values (0 by default).
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets what decides, in the step, which replica computes which tokens (the min-max dispatcher, exact to 0.4 % of the mean load, by default).
    /// `dispatcher` is called for each layer, and where the dispatcher's name is asked for. What a dispatcher of your own
    /// plans is checked in each step: every assignment once, on a rank that holds its expert.
    ///
    /// A dispatcher must be deterministic: every rank runs its own and all must agree. Of two ranks' dispatchers only the
    /// names are compared, not what the closure captured.
    pub fn with_dispatcher(mut self, dispatcher: impl Fn() -> Box<dyn Dispatcher> + Send + Sync + 'static) -> Self {
        self.dispatcher = DispatcherFactory::new(dispatcher);
        self
    }

    /// Sets when a layout is repaired in the step itself; `None` for never.
    pub fn with_repair(mut self, repair: Option<RepairConfig>) -> Self {
        self.repair = repair;
        self
    }

    /// Sets dispatcher and repair to those of a strategy: only [`PlannerStrategy::MinMax`] repairs layouts in the step. With
    /// the same strategy in [`PlannerConfig`](crate::train::PlannerConfig) it is a whole baseline; with another one, a hybrid.
    pub fn with_strategy(self, strategy: PlannerStrategy) -> Self {
        let repair = (strategy == PlannerStrategy::MinMax).then(RepairConfig::free);
        self.with_dispatcher(move || strategy.dispatcher()).with_repair(repair)
    }

    /// Sets which communication is moved behind compute (all that can be, by default).
    pub fn with_schedule(mut self, schedule: ScheduleConfig) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets how tokens travel between ranks (by default once to a rank, in passes where that pays).
    pub fn with_token_rows(mut self, token_rows: TokenRows) -> Self {
        self.token_rows = token_rows;
        self
    }

    /// Sets in how many chunks the tokens of a pass go through a layer (1 by default): while the experts compute one, the next
    /// travels to them and the one before back. Of `n` chunks about `1 - 1 / n` of the tokens' travel is hidden, and what it takes
    /// is `n` times the launches and products of an `n`-th of the rows. It pays where tokens travel for longer than that costs, which
    /// between two H200 with NVLink they did not.
    pub fn with_token_chunks(mut self, chunks: usize) -> Self {
        self.token_chunks = chunks;
        self
    }

    /// Sets the timeline that records what this rank computes and when its host waits. Communication on a GPU is recorded by
    /// the communicator; see `NcclConfig::with_timeline`.
    pub fn with_timeline(mut self, timeline: Timeline) -> Self {
        self.timeline = Some(timeline);
        self
    }

    /// The runtime of the rank that `comm` belongs to. Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Planner`] for 0 ranks on a node, [`FsepError::Config`] for no chunk of tokens or more than 1024, if the topology is
    /// not one of `comm`'s ranks or the configuration is not equal on all ranks, [`FsepError::Comm`] if the ranks are not whole groups of
    /// those that share experts or the communicators cannot be made.
    pub fn init(&self, comm: Arc<dyn Communicator>) -> Result<FsepRuntime, FsepError> {
        if !(1..=MAX_TOKEN_CHUNKS).contains(&self.token_chunks) {
            let chunks = self.token_chunks;
            return Err(FsepError::Config(format!("`token_chunks` is {chunks}: give 1 to {MAX_TOKEN_CHUNKS}")));
        }
        let topology = self.topology_of(comm.size())?;
        let repair = self.repair.map(LayoutRepair::new).transpose()?;
        self.check_equal(comm.as_ref(), &topology)?;
        let (rank, ranks) = (comm.rank(), self.expert_parallel_size.unwrap_or(comm.size()));
        let groups = Groups::new(comm, ranks)?;
        let first = rank - groups.experts().rank();
        let topology = topology.part(first..first + ranks)?;
        FsepRuntime::from_parts(groups, topology, repair, self)
    }

    fn topology_of(&self, world_size: usize) -> Result<Topology, FsepError> {
        match (&self.topology, self.ranks_per_node) {
            (Some(_), Some(_)) => Err(FsepError::Config(
                "`topology` and `ranks_per_node` both say which ranks share a node: give one of them".into(),
            )),
            (Some(topology), None) if topology.world_size() != world_size => Err(FsepError::Config(format!(
                "`topology` has {} ranks, but the group has {world_size}: give the ranks of each node, {world_size} in all",
                topology.world_size()
            ))),
            (Some(topology), None) => Ok(topology.clone()),
            (None, ranks_per_node) => Ok(Topology::uniform(world_size, ranks_per_node.unwrap_or(world_size))?),
        }
    }

    /// Ranks with other seeds would train on shards of different experts, and nothing later would notice.
    fn check_equal(&self, comm: &dyn Communicator, topology: &Topology) -> Result<(), FsepError> {
        let hash = |text: &str| digest(text.as_bytes());
        let fields = [
            ("seed", self.seed),
            ("expert_parallel_size", self.expert_parallel_size.unwrap_or(comm.size()) as u64),
            ("topology", hash(&format!("{topology:?}"))),
            ("dispatcher", hash(self.dispatcher.make().name())),
            ("repair", hash(&format!("{:?}", self.repair))),
            ("schedule", hash(&format!("{:?}", self.schedule))),
            ("token_rows", hash(&format!("{:?}", self.token_rows))),
            ("token_chunks", self.token_chunks as u64),
        ];
        match agree(comm, Operation::new("configuration of the runtime"), &fields)? {
            Some(difference) => {
                Err(FsepError::Config(format!("FsepRuntimeConfig has to be equal on all ranks, but {difference}")))
            }
            None => Ok(()),
        }
    }
}
