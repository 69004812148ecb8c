use std::{collections::HashMap, fmt};

use burn::{backend::DispatchTensor, module::ParamId};
use parking_lot::Mutex;

use super::reduction::{Part, Reduction};
use crate::{FsepError, FsepRuntime, ops::GradientSink};

/// Collects gradients while backward runs and starts to reduce a bucket when all of it is there.
///
/// Buckets are started in their order, each once between two syncs, whatever the order in which gradients come: all ranks
/// start the same reductions in the same order, also where a rank's graph lacks some parameter. What is missing or wrong
/// is found by the sync, which compares the gradients that buckets were made of with those that it is given.
pub(super) struct Collector {
    runtime: FsepRuntime,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Parameters by bucket; `None` until the first sync.
    buckets: Option<Vec<Vec<ParamId>>>,
    /// Hooks since the last sync that backward has not come to.
    expected: HashMap<ParamId, usize>,
    /// What backward has found of the gradients since the last sync.
    gradients: HashMap<ParamId, DispatchTensor>,
    /// Parameters by when their last hook ran.
    arrivals: Vec<ParamId>,
    started: Vec<StartedBucket>,
    paused: bool,
}

/// A bucket on its way, with the gradients that it was made of.
pub(super) struct StartedBucket {
    pub reduction: Reduction,
    pub gradients: Vec<(ParamId, DispatchTensor)>,
}

/// What happened since the last sync.
pub(super) struct Collected {
    /// All buckets, in order; `None` if there are none yet.
    pub buckets: Option<Vec<Vec<ParamId>>>,
    /// The first of them.
    pub started: Vec<StartedBucket>,
    /// Hooked parameters in the order of backward.
    pub arrivals: Vec<ParamId>,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let buckets = self.state.lock().buckets.as_ref().map(Vec::len);
        write!(f, "gradient buckets ({buckets:?}) of {:?}", self.runtime)
    }
}

impl Collector {
    pub fn new(runtime: &FsepRuntime) -> Self {
        // Without the outputs, which hold graphs, which hold the collector.
        Self { runtime: runtime.for_graph(), state: Mutex::default() }
    }

    pub fn runtime(&self) -> &FsepRuntime {
        &self.runtime
    }

    /// A hook of the parameter was made.
    pub fn expect(&self, parameter: ParamId) {
        *self.state.lock().expected.entry(parameter).or_default() += 1;
    }

    /// Starts no bucket until the next sync.
    pub fn pause(&self) {
        self.state.lock().paused = true;
    }

    pub fn num_started(&self) -> usize {
        self.state.lock().started.len()
    }

    /// Ends the period between two syncs.
    pub fn take(&self) -> Collected {
        let mut state = self.state.lock();
        let State { buckets, started, arrivals, .. } = std::mem::take(&mut *state);
        state.buckets = buckets.clone();
        Collected { buckets, started, arrivals }
    }

    /// Sets what is reduced together, and in which order, from now on.
    pub fn set_buckets(&self, buckets: Vec<Vec<ParamId>>) {
        self.state.lock().buckets = Some(buckets);
    }
}

impl GradientSink for Collector {
    fn arrived(&self, parameter: ParamId, gradient: DispatchTensor) {
        if self.runtime.world_size() == 1 {
            return;
        }
        let mut state = self.state.lock();
        let is_last = match state.expected.get_mut(&parameter) {
            Some(expected) => {
                *expected = expected.saturating_sub(1);
                *expected == 0
            }
            None => true,
        };
        state.gradients.insert(parameter, gradient);
        if is_last {
            state.arrivals.retain(|&id| id != parameter);
            state.arrivals.push(parameter);
            if let Err(error) = state.start_buckets(&self.runtime) {
                drop(state);
                self.runtime.fail(error);
            }
        }
    }
}

impl State {
    /// Starts the next buckets of which everything is there.
    fn start_buckets(&mut self, runtime: &FsepRuntime) -> Result<(), FsepError> {
        let Some(buckets) = self.buckets.as_ref().filter(|_| !self.paused) else { return Ok(()) };
        while let Some(bucket) = buckets.get(self.started.len()) {
            let is_there = |id| self.expected.get(id).is_none_or(|&n| n == 0) && self.gradients.contains_key(id);
            if !bucket.iter().all(is_there) {
                break;
            }
            let gradients: Vec<_> = bucket.iter().map(|id| (*id, self.gradients[id].clone())).collect();
            let parts = gradients.iter().map(|(_, gradient)| Part::Gradient(gradient.clone())).collect();
            let reduction = Reduction::start(runtime.dense_comm(), parts)?;
            self.started.push(StartedBucket { reduction, gradients });
        }
        Ok(())
    }
}

/// Splits a row of parameters into buckets: each is closed when it has `bucket_bytes` in single precision.
pub(super) fn split<T>(parameters: impl IntoIterator<Item = (T, usize)>, bucket_bytes: usize) -> Vec<Vec<T>> {
    let mut buckets = Vec::new();
    let (mut bucket, mut bytes) = (Vec::new(), 0);
    for (parameter, len) in parameters {
        bucket.push(parameter);
        bytes += len * size_of::<f32>();
        if bytes >= bucket_bytes {
            buckets.push(std::mem::take(&mut bucket));
            bytes = 0;
        }
    }
    if !bucket.is_empty() {
        buckets.push(bucket);
    }
    buckets
}
