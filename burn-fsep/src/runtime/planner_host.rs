//! The planner's view of the runtime.

use std::sync::Arc;

use burn_fsep_planner::{
    Layout, Topology,
    callback::{CallbackError, PlannerHost, RoutingObserver},
};

use super::FsepRuntime;
use crate::{
    FsepError,
    comm::{Operation, all_gather_u64},
};

impl PlannerHost for FsepRuntime {
    fn num_layers(&self) -> usize {
        FsepRuntime::num_layers(self)
    }

    fn topology(&self) -> Topology {
        FsepRuntime::topology(self).clone()
    }

    fn layout(&self, layer: usize) -> Arc<Layout> {
        FsepRuntime::layout(self, layer)
    }

    fn is_plannable(&self, layer: usize) -> bool {
        !self.has_fixed_layout(layer)
    }

    fn set_layout(&self, layer: usize, layout: Arc<Layout>) -> Result<(), CallbackError> {
        FsepRuntime::set_layout(self, layer, layout).map_err(|error| CallbackError::Host(Box::new(error)))
    }

    fn set_observer(&self, observer: Option<Arc<dyn RoutingObserver>>) {
        self.set_routing_observer(observer);
    }

    fn agree_min(&self, values: &[u64]) -> Result<Vec<u64>, CallbackError> {
        if values.is_empty() {
            return Ok(Vec::new());
        }
        let all = all_gather_u64(self.comm(), Operation::new("agreement on layouts"), values)
            .map_err(|error| CallbackError::Host(Box::new(FsepError::from(error))))?;
        let mut smallest = values.to_vec();
        for theirs in all.chunks_exact(values.len()) {
            for (a, &b) in smallest.iter_mut().zip(theirs) {
                *a = (*a).min(b);
            }
        }
        Ok(smallest)
    }
}
