use std::{ops::Range, sync::Arc, time::Instant};

use burn::{
    backend::Dispatch,
    tensor::{FloatDType, Int, Tensor},
};
use burn_fsep_planner::{
    Layout, PlannerError, RoutingCounts, Topology,
    dispatch::{DispatchPlan, Dispatcher, EvenSplit},
    repair::LayoutRepair,
};
use parking_lot::{Mutex, RwLock};

use super::{LayerStats, config::DispatcherFactory};
use crate::{
    FsepError,
    comm::{CommError, Communicator, ExchangePlan, Operation},
    ops::{NOT_FINITE, RoutingOps, Tracked, counts_of, token_exchange},
    schedule::Restore,
    shard::{ExpertShape, UnshardPlan},
};

/// What a runtime has to know of a layer.
#[derive(Debug, Clone)]
pub(crate) struct LayerConfig {
    pub num_experts: usize,
    pub slots_per_rank: usize,
    pub topk: usize,
    pub shape: ExpertShape,
    /// Experts have fixed owners: the layout cannot be changed.
    pub fixed_layout: bool,
    /// Type that experts travel and compute in; that of the parameters if `None`.
    pub compute_dtype: Option<FloatDType>,
}

/// One layer in one step, ready to run.
pub(crate) struct RoutedStep {
    pub layout: Arc<Layout>,
    pub unshard: Arc<UnshardPlan>,
    pub tokens: ExchangePlan,
    pub slot_rows: Vec<Range<usize>>,
    pub counts: Arc<RoutingCounts>,
    /// How many training forward passes the layer has seen, this one included.
    pub step_number: u64,
}

/// A layer's layout, dispatcher and last statistics.
pub(crate) struct LayerState {
    config: LayerConfig,
    active: RwLock<Active>,
    dispatch: Mutex<Dispatching>,
    last: Mutex<Last>,
    /// What static expert parallelism would do with the same tokens: the baseline of the statistics.
    static_layout: Layout,
}

#[derive(Clone)]
struct Active {
    layout: Arc<Layout>,
    unshard: Arc<UnshardPlan>,
    /// Slots that hold another expert than under the layout before.
    moved_slots: usize,
}

impl Active {
    fn replace(&mut self, layout: Arc<Layout>, shape: ExpertShape) {
        if *layout != *self.layout {
            self.moved_slots += layout.moved_slots(&self.layout);
            self.unshard = Arc::new(UnshardPlan::new(&layout, shape.shard_len(layout.num_ranks())));
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
    plan: DispatchPlan,
    static_plan: DispatchPlan,
}

#[derive(Default)]
struct Last {
    stats: Option<LayerStats>,
    training_steps: u64,
}

/// Words before the counts in a rank's message: layout fingerprint (2), wanted gradients, top-k, sizes of an expert
/// (2), whether experts have fixed owners, compute type, fingerprint of the layout of a prefetch (2).
const HEADER: usize = 10;

impl LayerState {
    pub fn new(
        config: LayerConfig,
        topology: &Topology,
        dispatcher: &DispatcherFactory,
        repair: Option<LayoutRepair>,
    ) -> Result<Self, FsepError> {
        let ranks = topology.world_size();
        let layout = Layout::static_ep(ranks, config.slots_per_rank, config.num_experts)?;
        let owned = config.num_experts.div_ceil(ranks);
        let unshard = UnshardPlan::new(&layout, config.shape.shard_len(ranks));
        Ok(Self {
            active: RwLock::new(Active { layout: Arc::new(layout), unshard: Arc::new(unshard), moved_slots: 0 }),
            dispatch: Mutex::new(Dispatching {
                dispatcher: dispatcher.make(),
                is_checked: cfg!(debug_assertions) || dispatcher.is_given(),
                repair: repair.filter(|_| !config.fixed_layout),
                plan: DispatchPlan::new(),
                static_plan: DispatchPlan::new(),
            }),
            last: Mutex::default(),
            static_layout: Layout::static_ep(ranks, owned, config.num_experts)?,
            config,
        })
    }

    pub fn layout(&self) -> Arc<Layout> {
        self.active.read().layout.clone()
    }

    /// The restore of this layer's experts for its next forward pass, before its tokens are known.
    pub fn restore_ahead(&self, layer: usize, weights: Tensor<2>) -> Restore {
        let Active { layout, unshard, .. } = self.active.read().clone();
        let operation = Operation::of_layer("restore ahead", layer).under_layout(layout.fingerprint());
        Restore::new(operation, layout, unshard, weights, self.config.compute_dtype)
    }

    pub fn is_fixed(&self) -> bool {
        self.config.fixed_layout
    }

    pub fn stats(&self) -> Option<LayerStats> {
        self.last.lock().stats.clone()
    }

    pub fn set_layout(&self, layout: Arc<Layout>) -> Result<(), FsepError> {
        if self.config.fixed_layout {
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
        active.replace(layout, self.config.shape);
        Ok(())
    }

    /// The layout in use counts as the one before: it came from a checkpoint.
    pub fn forget_moved_slots(&self) {
        self.active.write().moved_slots = 0;
    }

    /// Gathers the counts of all ranks, checks that all mean the same layer, and plans the dispatch.
    pub fn route(
        &self,
        layer: usize,
        comm: &Arc<dyn Communicator>,
        topology: &Topology,
        ends: Tensor<1, Int>,
        tracked: Tracked,
        ahead: Option<u64>,
    ) -> Result<RoutedStep, FsepError> {
        let layout = self.layout();
        let counts = self.gather_counts(layer, comm, &layout, ends, tracked, ahead)?;

        let start = Instant::now();
        let mut dispatch = self.dispatch.lock();
        let Dispatching { dispatcher, is_checked, repair, plan, static_plan } = &mut *dispatch;
        // Every rank repairs for itself, from the same counts and layout.
        if let (true, Some(repair)) = (tracked.any(), repair)
            && let Some(repaired) = repair.repair(topology, &layout, &counts)?
        {
            self.active.write().replace(Arc::new(repaired), self.config.shape);
        }
        let Active { layout, unshard, moved_slots } = self.active.read().clone();
        dispatcher.dispatch(topology, &layout, &counts, plan)?;
        let dispatch_time = start.elapsed();
        if *is_checked {
            plan.check(&layout, &counts)?;
        }
        let (tokens, slot_rows) = token_exchange(plan, &layout, comm.rank());

        let mut last = self.last.lock();
        if tracked.any() {
            EvenSplit::new().dispatch(topology, &self.static_layout, &counts, static_plan)?;
            last.training_steps += 1;
            self.active.write().moved_slots = 0;
            last.stats = Some(LayerStats {
                layer,
                counts: counts.clone(),
                imbalance_static: static_plan.max_over_mean(),
                imbalance: plan.max_over_mean(),
                cross_node_tokens: plan.cross_node_tokens(topology),
                off_rank_tokens: plan.off_rank_tokens(),
                moved_slots,
                dispatch_time,
            });
        }
        Ok(RoutedStep { layout, unshard, tokens, slot_rows, counts, step_number: last.training_steps })
    }

    /// All ranks' counts. `[E + 1] -> [N, E]`
    fn gather_counts(
        &self,
        layer: usize,
        comm: &Arc<dyn Communicator>,
        layout: &Layout,
        ends: Tensor<1, Int>,
        tracked: Tracked,
        ahead: Option<u64>,
    ) -> Result<Arc<RoutingCounts>, FsepError> {
        let fingerprint = layout.fingerprint();
        let LayerConfig { topk, shape, fixed_layout, compute_dtype, .. } = &self.config;
        let mut header: Vec<u32> = [fingerprint as u32, (fingerprint >> 32) as u32, tracked.bits()].into();
        header.extend([*topk as u32, shape.hidden as u32, shape.ffn as u32, u32::from(*fixed_layout)]);
        // No prefetch is a layout that no rank has.
        let (ahead, dtype) = (ahead.unwrap_or(0), compute_dtype.map_or(0, |dtype| dtype as u32 + 1));
        header.extend([dtype, ahead as u32, (ahead >> 32) as u32]);
        debug_assert_eq!(header.len(), HEADER);
        let (operation, num_experts) = (Operation::of_layer("routing counts", layer), self.config.num_experts);
        let all = Dispatch::fsep_gather_ends(ends.into_dispatch(), header, comm.clone(), operation)?;

        let messages: Vec<&[u32]> = all.chunks_exact(HEADER + num_experts + 1).collect();
        let message = messages[comm.rank()];
        let mut table = Vec::with_capacity(comm.size() * num_experts);
        for (peer, theirs) in messages.iter().enumerate() {
            let diverges = |what, range: Range<usize>, describe: fn(&[u32]) -> String| {
                (theirs[range.clone()] != message[range.clone()]).then(|| FsepError::Divergence {
                    what,
                    layer,
                    rank: comm.rank(),
                    ours: describe(&message[range.clone()]),
                    peer,
                    theirs: describe(&theirs[range]),
                })
            };
            let layout = diverges("the layout", 0..2, |words| format!("fingerprint {:08x}{:08x}", words[1], words[0]));
            let wanted = diverges("the wanted gradients", 2..3, |words| Tracked::describe(words[0]));
            let topk = diverges("top-k", 3..4, |words| words[0].to_string());
            let sizes = diverges("the experts' sizes", 4..6, |words| format!("D = {}, F = {}", words[0], words[1]));
            let owners = diverges("expert parallelism", 6..7, |words| {
                if words[0] == 1 { "static owners".into() } else { "sharded experts".into() }
            });
            let dtype = diverges("the compute type", 7..8, |words| format!("type {}", words[0]));
            let ahead = diverges("the prefetch (is begin_step called on all ranks?)", 8..10, |words| match words {
                [0, 0] => "none".into(),
                _ => format!("one under layout {:08x}{:08x}", words[1], words[0]),
            });
            if let Some(error) = layout.or(wanted).or(topk).or(sizes).or(owners).or(dtype).or(ahead) {
                return Err(error);
            }
            let ends = &theirs[HEADER..];
            if !ends.is_sorted() {
                let reason = format!("what came from rank {peer} are no counts");
                return Err(CommError::Engine { operation: operation.to_string(), reason }.into());
            }
            if ends[num_experts] != ends[num_experts - 1] {
                return Err(FsepError::Config(format!("the logits of rank {peer}'s router are {NOT_FINITE}")));
            }
            table.extend(counts_of(ends));
        }
        Ok(Arc::new(RoutingCounts::new(comm.size(), num_experts, table)?))
    }
}
