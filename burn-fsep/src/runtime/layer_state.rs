use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use burn::tensor::{Int, Tensor};
use burn_fsep_planner::{
    Layout, PlannerError, RoutingCounts, Topology,
    dispatch::{DispatchPlan, Dispatcher, EvenSplit, max_over_mean},
    repair::LayoutRepair,
};
use parking_lot::{Mutex, RwLock};

use super::{
    LayerStats, TokenRows,
    dispatcher_factory::DispatcherFactory,
    routing_message::RoutingMessage,
    token_rows::{RowsByRank, TokenTraffic},
};
use crate::{
    FsepError,
    comm::{Communicator, Groups, agree, digest},
    ops::{ChunkDispatch, LayerSpec, PlacedAssignments, RoutedDispatch, Tracked, token_exchange},
    shard::UnshardPlan,
};

/// A layer's layout, dispatcher and last statistics.
pub(super) struct LayerState {
    spec: Arc<LayerSpec>,
    active: RwLock<Active>,
    dispatch: Mutex<Dispatching>,
    last: Mutex<Last>,
    /// Assignments of each expert on all ranks, of the training passes since they were taken. Shape `[E]`.
    expert_loads: Mutex<Vec<u64>>,
    /// What static expert parallelism would do with the same tokens: the baseline of the statistics.
    static_layout: Layout,
    /// Whether the ranks have compared their options of the layer.
    is_compared: AtomicBool,
}

#[derive(Clone)]
struct Active {
    layout: Arc<Layout>,
    unshard: Arc<UnshardPlan>,
    /// Slots that hold another expert than under the layout before.
    moved_slots: usize,
}

impl Active {
    fn replace(&mut self, layout: Arc<Layout>, spec: &LayerSpec) {
        if *layout != *self.layout {
            self.moved_slots += layout.moved_slots(&self.layout);
            self.unshard = Arc::new(UnshardPlan::new(&layout, spec.shard_len()));
            self.layout = layout;
        }
    }
}

struct Dispatching {
    dispatcher: Box<dyn Dispatcher>,
    /// Whether its plans are checked: kernels rely on what they promise.
    is_checked: bool,
    /// Repairs the layout once the counts are known; not where experts have fixed owners.
    repair: Option<LayoutRepair>,
    token_rows: TokenRows,
    /// Of each chunk.
    plans: Vec<DispatchPlan>,
    static_plan: DispatchPlan,
}

/// What the routing of a chunk's tokens begins with.
pub(crate) struct ChunkStart {
    /// Which of this rank's tokens.
    pub range: Range<usize>,
    /// Where the rows of each expert, of none, and of what is no expert end. `[E + 2]`
    pub ends: Tensor<1, Int>,
    /// The row of each assignment among those sorted by expert. `[T * K]`
    pub row_of: Tensor<1, Int>,
}

/// What the routing of a pass begins with.
pub(super) struct Routing {
    pub chunks: Vec<ChunkStart>,
    /// Bytes of an element of a token.
    pub element: usize,
    /// Which gradients are wanted.
    pub tracked: Tracked,
    /// Fingerprint of the layout under which the layer's experts were prefetched, if they were.
    pub ahead: Option<u64>,
}

#[derive(Default)]
struct Last {
    stats: Option<LayerStats>,
    /// Training passes of the layer so far.
    pass: u64,
}

impl LayerState {
    pub fn new(
        spec: Arc<LayerSpec>,
        topology: &Topology,
        (dispatcher, repair, token_rows): (&DispatcherFactory, Option<LayoutRepair>, TokenRows),
    ) -> Result<Self, FsepError> {
        let (ranks, experts) = (spec.num_ranks, spec.num_experts);
        let layout = Layout::static_ep(ranks, spec.slots_per_rank, experts)?;
        let unshard = UnshardPlan::new(&layout, spec.shard_len());
        debug_assert_eq!(topology.world_size(), ranks);
        Ok(Self {
            active: RwLock::new(Active { layout: Arc::new(layout), unshard: Arc::new(unshard), moved_slots: 0 }),
            dispatch: Mutex::new(Dispatching {
                dispatcher: dispatcher.make(),
                is_checked: cfg!(debug_assertions) || dispatcher.is_given(),
                repair: repair.filter(|_| !spec.fixed_layout),
                token_rows,
                plans: Vec::new(),
                static_plan: DispatchPlan::new(),
            }),
            last: Mutex::default(),
            expert_loads: Mutex::new(vec![0; experts]),
            static_layout: Layout::static_ep(ranks, experts.div_ceil(ranks), experts)?,
            is_compared: AtomicBool::new(false),
            spec,
        })
    }

    pub fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    pub fn layout(&self) -> Arc<Layout> {
        self.active.read().layout.clone()
    }

    /// The layout that the layer uses now, and how shards travel under it.
    pub fn unshard_plan(&self) -> (Arc<Layout>, Arc<UnshardPlan>) {
        let Active { layout, unshard, .. } = self.active.read().clone();
        (layout, unshard)
    }

    /// A training pass of a step has been routed so.
    pub fn add_expert_loads(&self, loads: &[u64]) {
        self.expert_loads.lock().iter_mut().zip(loads).for_each(|(sum, load)| *sum += load);
    }

    /// What was added since the last call. Shape `[E]`.
    pub fn take_expert_loads(&self) -> Vec<u64> {
        let mut loads = self.expert_loads.lock();
        let none = vec![0; loads.len()];
        std::mem::replace(&mut *loads, none)
    }

    pub fn stats(&self) -> Option<LayerStats> {
        self.last.lock().stats.clone()
    }

    pub fn set_layout(&self, layout: Arc<Layout>) -> Result<(), FsepError> {
        if self.spec.fixed_layout {
            return Err(FsepError::Config(
                "the experts of this layer have fixed owners (static expert parallelism); use \
                 ExpertParallelism::Fsep for layouts that change"
                    .into(),
            ));
        }
        let mut active = self.active.write();
        let old = &active.layout;
        for (what, expected, actual) in [
            ("ranks of the layout", old.num_ranks(), layout.num_ranks()),
            ("slots of the layout", old.slots_per_rank(), layout.slots_per_rank()),
            ("experts of the layout", old.num_experts(), layout.num_experts()),
        ] {
            if expected != actual {
                return Err(PlannerError::Shape { what: what.into(), expected, actual }.into());
            }
        }
        active.replace(layout, &self.spec);
        Ok(())
    }

    /// The layout in use counts as the one before: it came from a checkpoint.
    pub fn forget_moved_slots(&self) {
        self.active.write().moved_slots = 0;
    }

    /// In the layer's first pass, checks that all ranks have configured it alike: of other options some would be noticed later
    /// by what they do, others (a loss's weight) never. Collective.
    fn compare_options(&self, comm: &dyn Communicator) -> Result<(), FsepError> {
        if self.is_compared.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let fields: Vec<_> = self.spec.options.iter().map(|(name, json)| (name, digest(json.as_bytes()))).collect();
        match agree(comm, self.spec.operation("options"), &fields)? {
            Some(difference) => Err(FsepError::Config(format!(
                "FSEPMoEConfig has to be equal on all ranks, but {difference} of layer {}; here it is {}",
                self.spec.layer, self.spec.options[&difference.field]
            ))),
            None => Ok(()),
        }
    }

    /// Gathers the counts of the ranks that share the experts, checks that all mean the same layer, and plans the dispatch. Collective.
    pub fn route(&self, groups: &Groups, topology: &Topology, routing: Routing) -> Result<RoutedDispatch, FsepError> {
        let Routing { chunks, element, tracked, ahead } = routing;
        self.compare_options(groups.world().as_ref())?;
        let comm = groups.experts();
        let layout = self.layout();
        let message = RoutingMessage { spec: &self.spec, layout: layout.fingerprint(), tracked, ahead };
        let counts_of_chunks = message.gather_counts(comm, chunks.iter().map(|chunk| chunk.ends.clone()).collect())?;
        let counts = Arc::new(total(&counts_of_chunks)?);

        let start = Instant::now();
        let mut dispatch = self.dispatch.lock();
        let Dispatching { dispatcher, is_checked, repair, token_rows, plans, static_plan } = &mut *dispatch;
        // Every rank repairs for itself, from the same counts and layout.
        if let (true, Some(repair)) = (tracked.any(), repair)
            && let Some(repaired) = repair.repair(topology, &layout, &counts)?
        {
            self.active.write().replace(Arc::new(repaired), &self.spec);
        }
        let Active { layout, unshard, moved_slots } = self.active.read().clone();
        plans.resize_with(chunks.len(), DispatchPlan::new);
        for (plan, counts) in plans.iter_mut().zip(&counts_of_chunks) {
            dispatcher.dispatch(topology, &layout, counts, plan)?;
        }
        let dispatch_time = start.elapsed();
        let traffic = TokenTraffic { spec: &self.spec, tracked, element };
        let (mut dispatches, mut token_bytes) = (Vec::with_capacity(chunks.len()), 0);
        for ((ChunkStart { range, row_of, .. }, plan), counts) in chunks.into_iter().zip(&*plans).zip(&counts_of_chunks)
        {
            if *is_checked {
                plan.check(&layout, counts)?;
            }
            let (tokens, slot_rows) = token_exchange(plan, &layout, self.spec.rank);
            let rank_rows = match token_rows.choose(plan, &traffic, comm.device().is_some()) {
                None => {
                    token_bytes += traffic.bytes_by_assignment(plan.off_rank_tokens() as f64) as u64;
                    None
                }
                Some(RowsByRank { most, counted }) => {
                    let placed = PlacedAssignments::new(row_of, plan, &layout, &self.spec);
                    let operation = self.spec.operation("token rows");
                    let rows = if counted { placed.gather_counts(comm, operation, &most)? } else { most };
                    token_bytes += traffic.bytes_by_rank(off_rank(&rows, self.spec.num_ranks) as f64) as u64;
                    Some(placed.lay_out(&rows))
                }
            };
            dispatches.push(ChunkDispatch { range, tokens, slot_rows, rank_rows });
        }

        let mut last = self.last.lock();
        if tracked.any() {
            EvenSplit::new().dispatch(topology, &self.static_layout, &counts, static_plan)?;
            last.pass += 1;
            let off_rank_tokens = plans.iter().map(DispatchPlan::off_rank_tokens).sum();
            self.active.write().moved_slots = 0;
            last.stats = Some(LayerStats {
                layer: self.spec.layer,
                counts: counts.clone(),
                imbalance_static: static_plan.max_over_mean(),
                imbalance: max_over_mean(&loads(plans)),
                cross_node_tokens: plans.iter().map(|plan| plan.cross_node_tokens(topology)).sum(),
                off_rank_tokens,
                token_bytes,
                token_bytes_by_assignment: traffic.bytes_by_assignment(off_rank_tokens as f64) as u64,
                moved_slots,
                dispatch_time,
            });
        }
        Ok(RoutedDispatch { pass: last.pass, counts, layout, unshard, chunks: dispatches })
    }
}

/// The counts of all chunks together.
fn total(chunks: &[RoutingCounts]) -> Result<RoutingCounts, PlannerError> {
    let [first, others @ ..] = chunks else { unreachable!("a pass has a chunk") };
    let mut table = first.as_slice().to_vec();
    for counts in others {
        table.iter_mut().zip(counts.as_slice()).for_each(|(sum, count)| *sum = sum.saturating_add(*count));
    }
    RoutingCounts::new(first.num_ranks(), first.num_experts(), table)
}

/// Assignments that each rank computes, of all chunks together. Shape `[N]`
fn loads(plans: &[DispatchPlan]) -> Vec<u64> {
    let mut loads = vec![0; plans.first().map_or(0, DispatchPlan::num_ranks)];
    for plan in plans {
        loads.iter_mut().zip(plan.loads()).for_each(|(sum, load)| *sum += load);
    }
    loads
}

/// What goes to other ranks of what goes from each rank to each, `[N, N]`.
fn off_rank(rows: &[u64], ranks: usize) -> u64 {
    rows.iter().enumerate().filter(|(i, _)| i / ranks != i % ranks).map(|(_, rows)| rows).sum()
}
