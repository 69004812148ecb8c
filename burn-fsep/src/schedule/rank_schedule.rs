use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
};

use burn::{module::ParamId, tensor::Tensor};
use parking_lot::Mutex;

use super::{ScheduleConfig, layer_order::LayerOrder};
use crate::{
    FsepError,
    ops::{Deferred, LayerPass, Unshard},
};

/// What a rank has started ahead, and what it has put off.
pub(crate) struct Schedule {
    config: ScheduleConfig,
    state: Mutex<State>,
    /// Gradients of the layer whose backward pass ran last, on their way to the shards.
    deferred: Mutex<Option<Deferred>>,
    /// Waits for means of gradients over replicas, in the order in which they were started.
    means: Mutex<Vec<Deferred>>,
}

#[derive(Default)]
struct State {
    order: LayerOrder,
    /// Backward has begun: the next forward pass belongs to another step.
    in_backward: bool,
    layer_of: HashMap<ParamId, usize>,
    /// This step's shards by layer, between `begin_step` and backward.
    shards: HashMap<usize, Tensor<2>>,
    ahead: Option<(usize, Arc<Unshard>)>,
    /// The parameters stay as they are after this batch: others of the same optimizer step follow.
    is_followed: bool,
    /// Experts that this batch's passes have left from the batch before, by layer.
    staying: HashMap<usize, Arc<Unshard>>,
    /// Those that this batch leaves for the next.
    left: HashMap<usize, Arc<Unshard>>,
    /// Passes whose forward ran, for the order of backward.
    awaiting_backward: Vec<AwaitingBackward>,
    missed: u64,
}

/// A pass whose forward has run, and the unshard that its backward needs. The unshard is held, so that whether it is
/// started does not depend on when a rank frees an output that nobody uses.
struct AwaitingBackward {
    pass: Weak<LayerPass>,
    unshard: Option<Arc<Unshard>>,
}

/// What the schedule says to a layer that begins its forward pass.
#[derive(Debug, Default)]
pub(crate) struct ForwardStart {
    /// The layer's unshard, started ahead.
    pub ahead: Option<Arc<Unshard>>,
    /// The layer to unshard behind this one, and its shards.
    pub next: Option<(usize, Tensor<2>)>,
    /// The layer's experts are kept for backward.
    pub keep: bool,
    /// And after it for the layer's pass in the next batch.
    pub leave: bool,
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schedule({:?})", self.config)
    }
}

impl Schedule {
    pub fn new(config: ScheduleConfig) -> Self {
        Self { config, state: Mutex::default(), deferred: Mutex::default(), means: Mutex::default() }
    }

    pub fn config(&self) -> ScheduleConfig {
        self.config
    }

    /// Remembers whose shards a parameter is; ids stay while values change.
    pub fn register(&self, param: ParamId, layer: usize) {
        self.state.lock().layer_of.insert(param, layer);
    }

    /// Which layers' shards the parameters are that were registered.
    pub fn registered(&self) -> HashMap<ParamId, usize> {
        self.state.lock().layer_of.clone()
    }

    /// Whether the batch that begins next is followed by others of the same optimizer step.
    pub fn set_followed(&self, is_followed: bool) {
        self.state.lock().is_followed = is_followed;
    }

    /// Frees what was left for a batch that does not come.
    pub fn forget_left(&self) {
        let mut state = self.state.lock();
        let left: Vec<_> = std::mem::take(&mut state.left).into_values().collect();
        let staying: Vec<_> = std::mem::take(&mut state.staying).into_values().collect();
        left.iter().chain(&staying).for_each(|unshard| unshard.discard());
    }

    /// A pass leaves its layer's experts for the layer's pass in the next batch.
    pub fn leave(&self, layer: usize, unshard: Arc<Unshard>) {
        self.state.lock().left.insert(layer, unshard);
    }

    /// A step begins with these shards, by layer. Returns the layer to unshard first, and its shards.
    pub fn begin_step(&self, shards: HashMap<usize, Tensor<2>>) -> Option<(usize, Tensor<2>)> {
        let mut state = self.state.lock();
        state.begin();
        state.shards = shards;
        let first = state.order.first().filter(|layer| self.config.prefetch_forward && !state.stays(*layer))?;
        Some((first, state.shards.get(&first)?.clone()))
    }

    /// A layer will be unsharded ahead.
    pub fn set_ahead(&self, layer: usize, unshard: Arc<Unshard>) {
        self.state.lock().ahead = Some((layer, unshard));
    }

    /// A layer begins a training forward pass. `is_current` tells whether an unshard is of the shards that the layer has now.
    pub fn begin_forward(&self, layer: usize, is_current: impl Fn(&Unshard) -> bool) -> ForwardStart {
        let mut state = self.state.lock();
        if state.in_backward {
            state.begin();
        }
        let position = state.order.begin_layer(layer);
        let staying = state.staying.remove(&layer).map(|unshard| (layer, unshard));
        let mut ahead = None;
        for (of, unshard) in [staying, state.ahead.take()].into_iter().flatten() {
            if of == layer && ahead.is_none() && is_current(&unshard) {
                ahead = Some(unshard);
            } else {
                state.cancel(&unshard);
            }
        }
        let next = position.next.filter(|next| self.config.prefetch_forward && !state.stays(*next));
        let next = next.and_then(|layer| Some((layer, state.shards.get(&layer)?.clone())));
        let keep = position.left.is_some_and(|left| left < self.config.kept_layers);
        let leave = keep && state.is_followed && !state.left.contains_key(&layer);
        ForwardStart { ahead, next, keep, leave }
    }

    /// Unshards that were started ahead for nothing.
    pub fn missed(&self) -> u64 {
        self.state.lock().missed
    }

    /// A pass's backward will follow its forward, unless the output is dropped.
    pub fn await_backward(&self, pass: &Arc<LayerPass>) {
        let unshard = pass.backward_unshard().cloned();
        self.state.lock().awaiting_backward.push(AwaitingBackward { pass: Arc::downgrade(pass), unshard });
    }

    /// A layer begins its backward pass. Returns the unshard of the one whose backward pass comes next.
    pub fn begin_backward(&self, pass: &LayerPass) -> Option<Arc<Unshard>> {
        let mut state = self.state.lock();
        state.in_backward = true;
        state.shards.clear();
        let place = state.awaiting_backward.iter().rposition(|other| std::ptr::eq(other.pass.as_ptr(), pass))?;
        state.awaiting_backward.truncate(place);
        if !self.config.prefetch_backward {
            return None;
        }
        state.awaiting_backward.last().and_then(|before| before.unshard.clone())
    }

    /// Puts work off until the backward pass of another layer is under way, or backward ends; where nothing is put off, it is
    /// done now.
    pub fn defer(&self, work: Deferred) -> Result<(), FsepError> {
        if !self.config.delay_reshard {
            return work();
        }
        let before = self.deferred.lock().replace(work);
        before.map_or(Ok(()), |work| work())
    }

    /// Does what was put off.
    pub fn catch_up(&self) -> Result<(), FsepError> {
        let work = self.deferred.lock().take();
        work.map_or(Ok(()), |work| work())
    }

    /// Puts the wait for a mean over replicas off until gradients are collected.
    pub fn await_mean(&self, wait: Deferred) {
        self.means.lock().push(wait);
    }

    /// Waits for the means, the first that was started first.
    pub fn finish_means(&self) -> Result<(), FsepError> {
        let means = std::mem::take(&mut *self.means.lock());
        means.into_iter().try_for_each(|wait| wait())
    }

    /// Forgets everything under way, after an error.
    pub fn reset(&self) {
        let mut state = self.state.lock();
        state.shards.clear();
        state.awaiting_backward.clear();
        state.order.begin();
        let ahead = (state.ahead.take(), std::mem::take(&mut state.left), std::mem::take(&mut state.staying));
        drop(state);
        drop((ahead, self.deferred.lock().take(), std::mem::take(&mut *self.means.lock())));
    }
}

impl State {
    fn begin(&mut self) {
        self.in_backward = false;
        self.order.begin();
        self.awaiting_backward.clear();
        self.shards.clear();
        if let Some((_, unshard)) = self.ahead.take() {
            self.cancel(&unshard);
        }
        let left = std::mem::take(&mut self.left);
        for unshard in std::mem::replace(&mut self.staying, left).into_values() {
            self.cancel(&unshard);
        }
    }

    /// Whether a layer's experts are there since the batch before.
    fn stays(&self, layer: usize) -> bool {
        self.staying.contains_key(&layer)
    }

    /// An unshard that was started ahead cannot be used. The layer before may hold it: what it received is freed now.
    fn cancel(&mut self, unshard: &Unshard) {
        unshard.discard();
        self.missed += 1;
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;
    use burn_fsep_planner::Layout;

    use super::*;
    use crate::comm::Operation;

    /// A backend that cannot tell tensors apart has no prefetch, and works.
    #[test]
    fn an_unshard_of_other_shards_or_of_another_layer_is_cancelled() {
        let schedule = Schedule::new(ScheduleConfig::new());
        let weights = Tensor::<2>::zeros([2, 3], &Device::flex());
        let ahead = |layer| {
            let layout = Arc::new(Layout::static_ep(1, 2, 2).unwrap());
            let operation = Operation::of_layer("unshard ahead", layer);
            let unshard =
                Arc::new(Unshard::new(operation, layout, weights.clone(), Box::new(|_| Ok(Box::new(7usize)))));
            unshard.start().unwrap();
            schedule.set_ahead(layer, unshard.clone());
            unshard
        };
        let used = ahead(1);
        assert!(schedule.begin_forward(1, |_| true).ahead.is_some_and(|unshard| Arc::ptr_eq(&unshard, &used)));
        assert_eq!((schedule.missed(), used.take::<usize>()), (0, Ok(7)));
        for (layer, is_current) in [(1, false), (2, true)] {
            let unused = ahead(1);
            assert!(schedule.begin_forward(layer, |_| is_current).ahead.is_none());
            assert!(unused.take::<usize>().is_err(), "what it received is freed");
        }
        assert_eq!(schedule.missed(), 2);
    }
}
