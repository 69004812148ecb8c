use std::{any::Any, fmt, sync::Arc};

use burn::tensor::{FloatDType, Tensor};
use burn_fsep_planner::Layout;
use parking_lot::Mutex;

use crate::{comm::Operation, shard::UnshardPlan};

/// The restore of one layer's experts to this rank's slots: planned, then started, then taken by the layer.
///
/// Not generic over the backend, since a layer starts the restore of another one.
pub struct Restore {
    pub(crate) operation: Operation,
    pub(crate) layout: Arc<Layout>,
    pub(crate) plan: Arc<UnshardPlan>,
    /// This rank's shards, without autodiff. `[E, S]`
    pub(crate) weights: Tensor<2>,
    /// Type that experts travel and compute in; that of the shards if `None`.
    pub(crate) dtype: Option<FloatDType>,
    started: Mutex<Option<Box<dyn Any + Send>>>,
}

impl fmt::Debug for Restore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Restore({}, started: {})", self.operation, self.is_started())
    }
}

impl Restore {
    pub(crate) fn new(
        operation: Operation,
        layout: Arc<Layout>,
        plan: Arc<UnshardPlan>,
        weights: Tensor<2>,
        dtype: Option<FloatDType>,
    ) -> Self {
        Self { operation, layout, plan, weights, dtype, started: Mutex::default() }
    }

    pub(crate) fn is_started(&self) -> bool {
        self.started.lock().is_some()
    }

    /// Keeps what was started until the layer comes.
    pub(crate) fn put<P: Send + 'static>(&self, started: P) {
        *self.started.lock() = Some(Box::new(started));
    }

    /// Gives up what was started: nobody will take it.
    pub(crate) fn discard(&self) {
        drop(self.started.lock().take());
    }

    /// What was started, if anything was.
    pub(crate) fn take<P: 'static>(&self) -> Option<P> {
        self.started.lock().take().and_then(|started| started.downcast().ok()).map(|started| *started)
    }
}
