use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
};

use burn::{module::ParamId, tensor::Tensor};
use parking_lot::Mutex;

use super::{Restore, ScheduleConfig, order::LayerOrder};
use crate::{FsepError, ops::MoeStep};

/// What a rank has started ahead, and what it has put off.
pub(crate) struct Schedule {
    config: ScheduleConfig,
    state: Mutex<State>,
    /// Gradients of the layer whose backward pass ran last, on their way to the shards.
    deferred: Mutex<Option<Deferred>>,
}

type Deferred = Box<dyn FnOnce() -> Result<(), FsepError> + Send>;

#[derive(Default)]
struct State {
    order: LayerOrder,
    /// Backward has begun: the next forward pass belongs to another step.
    turned: bool,
    layer_of: HashMap<ParamId, usize>,
    /// This step's shards by layer, between `begin_step` and backward.
    shards: HashMap<usize, Tensor<2>>,
    ahead: Option<(usize, Arc<Restore>)>,
    /// Layers whose forward pass ran, for the order of backward.
    forwarded: Vec<Forwarded>,
    missed: u64,
}

/// A pass whose forward has run, and the restore that its backward needs. The restore is held, so that whether it is
/// started does not depend on when a rank frees an output that nobody uses.
struct Forwarded {
    step: Weak<MoeStep>,
    restore: Option<Arc<Restore>>,
}

/// What the schedule says to a layer that begins its forward pass.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    /// The layer's restore, started ahead.
    pub ahead: Option<Arc<Restore>>,
    /// The layer to restore behind this one, and its shards.
    pub next: Option<(usize, Tensor<2>)>,
    /// Backward begins with this layer: its experts are kept.
    pub keep: bool,
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schedule({:?})", self.config)
    }
}

impl Schedule {
    pub fn new(config: ScheduleConfig) -> Self {
        Self { config, state: Mutex::default(), deferred: Mutex::default() }
    }

    pub fn config(&self) -> ScheduleConfig {
        self.config
    }

    /// Remembers whose shards a parameter is; ids stay while values change.
    pub fn register(&self, param: ParamId, layer: usize) {
        self.state.lock().layer_of.insert(param, layer);
    }

    /// A step begins. Returns the layer to restore first, and its shards.
    pub fn begin_step(&self, shards: Vec<(ParamId, Tensor<2>)>) -> Option<(usize, Tensor<2>)> {
        let mut state = self.state.lock();
        state.begin();
        let State { layer_of, order, .. } = &*state;
        let by_layer = shards.into_iter().filter_map(|(id, weights)| Some((*layer_of.get(&id)?, weights))).collect();
        let first = order.first();
        state.shards = by_layer;
        self.config.prefetch_forward.then_some(())?;
        first.and_then(|layer| Some((layer, state.shards.get(&layer)?.clone())))
    }

    /// A layer was restored ahead.
    pub fn restored_ahead(&self, layer: usize, restore: Arc<Restore>) {
        self.state.lock().ahead = Some((layer, restore));
    }

    /// A layer begins a training forward pass.
    pub fn enter(&self, layer: usize) -> Entry {
        let mut state = self.state.lock();
        if state.turned {
            state.begin();
        }
        let position = state.order.enter(layer);
        let ahead = match state.ahead.take() {
            Some((of, restore)) if of == layer => Some(restore),
            Some((_, restore)) => {
                state.miss(&restore);
                None
            }
            None => None,
        };
        let next = position.next.filter(|_| self.config.prefetch_forward);
        let next = next.and_then(|layer| Some((layer, state.shards.get(&layer)?.clone())));
        Entry { ahead, next, keep: position.is_last && self.config.prefetch_backward }
    }

    /// A restore that was started ahead cannot be used.
    pub fn miss(&self, restore: &Restore) {
        self.state.lock().miss(restore);
    }

    /// Restores that were started ahead for nothing.
    pub fn missed(&self) -> u64 {
        self.state.lock().missed
    }

    /// A layer's forward pass runs: its backward pass will follow, unless the output is dropped.
    pub fn forwarded(&self, step: &Arc<MoeStep>) {
        let restore = step.backward_restore().cloned();
        self.state.lock().forwarded.push(Forwarded { step: Arc::downgrade(step), restore });
    }

    /// A layer begins its backward pass. Returns the restore of the one whose backward pass comes next.
    pub fn turn(&self, step: &MoeStep) -> Option<Arc<Restore>> {
        let mut state = self.state.lock();
        state.turned = true;
        state.shards.clear();
        let place = state.forwarded.iter().rposition(|other| std::ptr::eq(other.step.as_ptr(), step))?;
        state.forwarded.truncate(place);
        if !self.config.prefetch_backward {
            return None;
        }
        state.forwarded.last().and_then(|before| before.restore.clone())
    }

    /// Puts work off until the backward pass of another layer is under way, or backward ends.
    pub fn defer(&self, work: Deferred) -> Result<(), FsepError> {
        let before = self.deferred.lock().replace(work);
        before.map_or(Ok(()), |work| work())
    }

    /// Does what was put off.
    pub fn catch_up(&self) -> Result<(), FsepError> {
        let work = self.deferred.lock().take();
        work.map_or(Ok(()), |work| work())
    }

    /// Forgets everything under way, after an error.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        state.shards.clear();
        state.forwarded.clear();
        state.order.begin();
        let ahead = state.ahead.take();
        drop(state);
        drop((ahead, self.deferred.lock().take()));
    }
}

impl State {
    fn begin(&mut self) {
        self.turned = false;
        self.order.begin();
        self.forwarded.clear();
        self.shards.clear();
        if let Some((_, restore)) = self.ahead.take() {
            self.miss(&restore);
        }
    }

    /// The layer before may hold the restore: what it received is freed now.
    fn miss(&mut self, restore: &Restore) {
        restore.discard();
        self.missed += 1;
    }
}
