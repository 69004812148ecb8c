use std::{
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Weak},
};

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{FloatDType, Int, Tensor},
};
use burn_fsep_planner::{Layout, Topology, repair::LayoutRepair};
use parking_lot::{Mutex, RwLock};

use super::{
    FsepRuntimeConfig, StepStats,
    config::DispatcherFactory,
    layer::{LayerConfig, LayerState, RoutedStep},
};
use crate::{
    FsepError, Timeline,
    comm::{
        Communicator, Operation,
        local::{LocalCommunicator, panic_message},
    },
    ops::{self, Restores, Tracked},
    schedule::{Entry, Restore, Schedule},
    shard::{RestoredGauge, UnshardPlan},
};

use burn_fsep_planner::BackgroundPlanner;

/// A rank's runtime, shared by its FSEP layers. Cloning gives another handle on the same runtime.
#[derive(Clone)]
pub struct FsepRuntime {
    inner: Arc<Inner>,
    /// Not a part of `inner`: an output holds its autodiff graph, which holds a handle on the runtime.
    outputs: Arc<Outputs>,
}

/// The first row of each layer's last output, with its pass, to connect it to the loss.
#[derive(Default)]
pub(crate) struct Outputs(Mutex<BTreeMap<usize, (u64, Tensor<2>)>>);

impl Outputs {
    /// Forgets a layer's output whose backward pass has run: it cannot be connected to another loss.
    pub fn forget(&self, layer: usize, pass: u64) {
        let mut outputs = self.0.lock();
        if outputs.get(&layer).is_some_and(|(last, _)| *last == pass) {
            outputs.remove(&layer);
        }
    }
}

struct Inner {
    /// Counts, flags.
    control: Arc<dyn Communicator>,
    /// Tokens and their gradients.
    tokens: Arc<dyn Communicator>,
    /// Shards and their gradients.
    weights: Arc<dyn Communicator>,
    /// Gradients of replicated parameters.
    dense: Arc<dyn Communicator>,
    topology: Topology,
    seed: u64,
    dispatcher: DispatcherFactory,
    repair: Option<LayoutRepair>,
    layers: RwLock<Vec<Arc<LayerState>>>,
    restored: RestoredGauge,
    schedule: Schedule,
    timeline: Option<Timeline>,
    error: Mutex<Option<FsepError>>,
    planner: RwLock<Weak<BackgroundPlanner>>,
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
        comm: Arc<dyn Communicator>,
        topology: Topology,
        repair: Option<LayoutRepair>,
        config: &FsepRuntimeConfig,
    ) -> Result<Self, FsepError> {
        let inner = Inner {
            tokens: comm.duplicate("tokens")?,
            weights: comm.duplicate("weights")?,
            dense: comm.duplicate("dense gradients")?,
            control: comm,
            topology,
            seed: config.seed,
            dispatcher: config.dispatcher.clone(),
            repair,
            layers: RwLock::default(),
            restored: RestoredGauge::default(),
            schedule: Schedule::new(config.schedule),
            timeline: config.timeline.clone(),
            error: Mutex::default(),
            planner: RwLock::default(),
        };
        Ok(Self { inner: Arc::new(inner), outputs: Arc::default() })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.inner.control.rank()
    }

    /// World size `N`.
    pub fn world_size(&self) -> usize {
        self.inner.control.size()
    }

    /// The ranks and their nodes.
    pub fn topology(&self) -> &Topology {
        &self.inner.topology
    }

    /// The seed of initial values.
    pub fn seed(&self) -> u64 {
        self.inner.seed
    }

    /// The communicator for counts and flags; also for collectives of the user's own, as long as
    /// all ranks call them in the same order.
    pub fn comm(&self) -> &dyn Communicator {
        self.inner.control.as_ref()
    }

    pub(crate) fn tokens_comm(&self) -> &dyn Communicator {
        self.inner.tokens.as_ref()
    }

    pub(crate) fn weights_comm(&self) -> &dyn Communicator {
        self.inner.weights.as_ref()
    }

    pub(crate) fn schedule(&self) -> &Schedule {
        &self.inner.schedule
    }

    /// The record of what ran when, if one is kept.
    pub fn timeline(&self) -> Option<&Timeline> {
        self.inner.timeline.as_ref()
    }

    /// For gradients of replicated parameters, which travel while backward runs.
    pub(crate) fn dense_comm(&self) -> &Arc<dyn Communicator> {
        &self.inner.dense
    }

    /// Counts the bytes of restored expert weights alive on this rank.
    pub fn restored_gauge(&self) -> &RestoredGauge {
        &self.inner.restored
    }

    /// Number of FSEP layers initialised with this runtime.
    pub fn num_layers(&self) -> usize {
        self.inner.layers.read().len()
    }

    /// The layout that a layer uses now.
    ///
    /// # Panics
    ///
    /// If there is no such layer.
    pub fn layout(&self, layer: usize) -> Arc<Layout> {
        self.layer(layer).layout()
    }

    /// Sets the layout that a layer uses from its next forward pass on. All ranks must set the same layout between
    /// the same two steps; the layer's next forward pass checks that they did.
    ///
    /// # Errors
    ///
    /// [`FsepError::Planner`] if the layout is not of the layer's sizes, [`FsepError::Config`] if the layer's experts
    /// have fixed owners (static expert parallelism) or there is no such layer.
    pub fn set_layout(&self, layer: usize, layout: Arc<Layout>) -> Result<(), FsepError> {
        let layers = self.inner.layers.read();
        let state = layers
            .get(layer)
            .ok_or_else(|| FsepError::Config(format!("there is no layer {layer}: the runtime has {}", layers.len())))?;
        state.set_layout(layout)
    }

    /// A layer goes on with the layout of a checkpoint: nothing has moved since the step before.
    pub(crate) fn resume_layout(&self, layer: usize, layout: Arc<Layout>) -> Result<(), FsepError> {
        self.set_layout(layer, layout)?;
        self.layer(layer).forget_moved_slots();
        Ok(())
    }

    /// What the layers' last training forward passes looked like.
    pub fn stats(&self) -> StepStats {
        StepStats { layers: self.inner.layers.read().iter().filter_map(|layer| layer.stats()).collect() }
    }

    /// Tells the schedule which parameters the coming forward pass will use, so that each layer's experts can be restored
    /// behind the compute of the layer before; the first layer's restore starts now. Collective, once before each training
    /// forward pass; [`Trainer`](crate::train::Trainer) and `FsepStrategy` call it for you.
    ///
    /// Without it, layers restore their experts when they come to them, and the result is the same. The order of layers is
    /// learned from the step before. A step that runs layers in another order, or with other parameters than `model` has now,
    /// restores these when it comes to them; [`FsepRuntime::missed_prefetches`] counts such cases.
    ///
    /// # Errors
    ///
    /// [`FsepError::Comm`] if the restore cannot be started.
    pub fn begin_step<M: Module>(&self, model: &M) -> Result<(), FsepError> {
        if !self.inner.schedule.config().prefetch_forward || self.world_size() == 1 {
            return Ok(());
        }
        let mut shards = Shards(Vec::new());
        model.visit(&mut shards);
        if let Some((layer, weights)) = self.inner.schedule.begin_step(shards.0) {
            let restore = Arc::new(self.layer(layer).restore_ahead(layer, weights));
            ops::start_restore(&restore, self).inspect_err(|error| {
                self.inner.schedule.reset();
                self.tell_peers(&error.to_string());
            })?;
            self.inner.schedule.restored_ahead(layer, restore);
        }
        Ok(())
    }

    /// Experts that were prefetched for nothing: the step ran other layers, or with other parameters, than was expected.
    pub fn missed_prefetches(&self) -> u64 {
        self.inner.schedule.missed()
    }

    /// A layer with these shards begins a training forward pass.
    pub(crate) fn enter(&self, layer: usize, shards: &Tensor<2>) -> Entry {
        let mut entry = self.inner.schedule.enter(layer);
        if let Some(stale) = entry.ahead.take_if(|ahead| !ops::is_same(&ahead.weights, shards)) {
            self.inner.schedule.miss(&stale);
        }
        entry
    }

    /// The restores of a layer's pass, and what it starts for the layer after.
    pub(crate) fn restores(&self, layer: usize, pass: &RestorePass, entry: Entry) -> Restores {
        let RestorePass { weights, layout, unshard, number, tracked, dtype } = pass;
        let schedule = &self.inner.schedule;
        let restore = |name| {
            let operation = Operation::of_layer(name, layer).in_pass(*number);
            Arc::new(Restore::new(operation, layout.clone(), unshard.clone(), weights.clone(), *dtype))
        };
        let next = entry.next.map(|(layer, weights)| {
            let restore = Arc::new(self.layer(layer).restore_ahead(layer, weights));
            schedule.restored_ahead(layer, restore.clone());
            restore
        });
        Restores {
            forward: entry.ahead.unwrap_or_else(|| restore("restore for forward")),
            backward: restore("restore for backward"),
            next,
            keep: entry.keep && tracked.needs_experts_in_backward(),
        }
    }

    /// Runs a part of a step (forward, backward, gradient synchronisation) and returns a typed error where it fails.
    ///
    /// Burn's modules and its backward pass return no errors, so FSEP's operations panic when a collective fails.
    /// This catches such a panic, and any other one, and lets the other ranks know: they get an error that names this
    /// rank instead of waiting for it. A rank without peers can go on after an error.
    ///
    /// ```
    /// # use burn_fsep::FsepRuntime;
    /// let runtime = FsepRuntime::single();
    /// let result = runtime.run(|| panic!("out of luck"));
    /// assert_eq!(result.unwrap_err().to_string(), "the step panicked: out of luck");
    /// ```
    ///
    /// # Errors
    ///
    /// The first [`FsepError`] of this rank, or [`FsepError::Panicked`].
    pub fn run<T>(&self, step: impl FnOnce() -> T) -> Result<T, FsepError> {
        catch_unwind(AssertUnwindSafe(step)).map_err(|payload| {
            self.outputs.0.lock().clear();
            self.inner.schedule.reset();
            let error = self.inner.error.lock().take();
            error.unwrap_or_else(|| {
                let message = panic_message(payload.as_ref());
                self.tell_peers(&format!("panicked: {message}"));
                FsepError::Panicked(message)
            })
        })
    }

    /// Connects every FSEP layer of this step to the loss, without changing the loss.
    ///
    /// Backward reaches only what the loss depends on. If a rank's loss happens not to depend on some layer's output
    /// (a branch not taken, a head not used), that rank would skip the layer's backward collectives, for which the
    /// others wait. A connected layer takes part with zero gradients. Models in which every rank always uses every
    /// layer do not need it. Of a layer that runs more than once in a step, the last run is connected; one whose backward
    /// pass has run already is left alone.
    pub fn connect(&self, loss: Tensor<1>) -> Tensor<1> {
        let outputs = std::mem::take(&mut *self.outputs.0.lock());
        outputs.into_values().fold(loss, |loss, (_, output)| {
            // Masked, not multiplied by zero: an output that is not finite must not reach the loss.
            let everything = Tensor::<2>::ones(output.shape(), &output.device()).equal_elem(1);
            let dtype = FloatDType::from(loss.dtype());
            loss + output.mask_fill(everything, 0.0).sum().cast(dtype)
        })
    }

    /// Ends the group with an error and unwinds to [`FsepRuntime::run`].
    pub(crate) fn fail(&self, error: FsepError) -> ! {
        let message = error.to_string();
        self.tell_peers(&message);
        self.inner.error.lock().get_or_insert(error);
        panic!("rank {}: {message}", self.rank())
    }

    /// Ends the group, unless this rank is alone: then nobody waits for it, and it can go on.
    fn tell_peers(&self, reason: &str) {
        if self.world_size() > 1 {
            self.comm().abort(reason);
        }
    }

    /// The handle of operations in the autodiff graph, which has no outputs of its own, and the outputs.
    pub(crate) fn for_graph(&self) -> (Self, Weak<Outputs>) {
        let handle = Self { inner: self.inner.clone(), outputs: Arc::default() };
        (handle, Arc::downgrade(&self.outputs))
    }

    pub(crate) fn register_layer(&self, config: LayerConfig) -> Result<usize, FsepError> {
        let Inner { topology, dispatcher, repair, .. } = self.inner.as_ref();
        let layer = LayerState::new(config, topology, dispatcher, repair.clone())?;
        let mut layers = self.inner.layers.write();
        layers.push(Arc::new(layer));
        Ok(layers.len() - 1)
    }

    pub(crate) fn has_fixed_layout(&self, layer: usize) -> bool {
        self.layer(layer).is_fixed()
    }

    pub(crate) fn register_shards(&self, layer: usize, param: ParamId) {
        self.inner.schedule.register(param, layer);
    }

    fn layer(&self, layer: usize) -> Arc<LayerState> {
        let layers = self.inner.layers.read();
        let count = layers.len();
        layers.get(layer).unwrap_or_else(|| panic!("there is no layer {layer}: the runtime has {count}")).clone()
    }

    /// Exchanges the routing counts of a layer and plans its dispatch. `ends`: `[E + 1]`, where the rows of each expert, and
    /// those of none, end.
    /// `ahead` is the fingerprint of the layout under which the layer's experts were prefetched, if they were.
    pub(crate) fn route(
        &self,
        layer: usize,
        ends: Tensor<1, Int>,
        tracked: Tracked,
        ahead: Option<u64>,
    ) -> Result<RoutedStep, FsepError> {
        let _span = self.timeline().and_then(|timeline| timeline.wait(format!("routing counts, layer {layer}")));
        let routed = self.layer(layer).route(layer, &self.inner.control, &self.inner.topology, ends, tracked, ahead)?;
        if let (true, Some(planner)) = (tracked.any(), self.inner.planner.read().upgrade()) {
            planner.submit(layer, routed.step_number, routed.counts.clone());
        }
        Ok(routed)
    }

    /// Remembers a layer's output for [`FsepRuntime::connect`].
    pub(crate) fn remember_output(&self, layer: usize, pass: u64, output: &Tensor<2>) {
        let [rows, width] = output.dims();
        // A row of its own: a view would keep the whole output in memory.
        let row = output.clone().slice([0..rows.min(1), 0..width]) + 0.0;
        self.outputs.0.lock().insert(layer, (pass, row));
    }

    /// Sets the planner that is given the counts of each training forward pass, for as long as it lives.
    pub(crate) fn set_planner(&self, planner: Weak<BackgroundPlanner>) {
        *self.inner.planner.write() = planner;
    }
}

/// What the restores of one pass of a layer depend on.
pub(crate) struct RestorePass {
    /// This rank's shards, without autodiff. `[E, S]`
    pub weights: Tensor<2>,
    pub layout: Arc<Layout>,
    pub unshard: Arc<UnshardPlan>,
    pub number: u64,
    pub tracked: Tracked,
    pub dtype: Option<FloatDType>,
}

/// All matrices among a model's parameters; the schedule knows which are shards.
struct Shards(Vec<(ParamId, Tensor<2>)>);

impl ModuleVisitor for Shards {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let [rows, columns] = param.shape()[..] {
            self.0.push((param.id, param.val().inner().reshape([rows, columns])));
        }
    }
}
