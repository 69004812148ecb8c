#[cfg(feature = "train")]
use std::sync::Arc;

#[cfg(feature = "train")]
use burn_fsep_planner::callback::RoutingObserver;
use parking_lot::RwLock;

/// Who learns the routing counts of training passes, and of which.
#[derive(Default)]
pub(super) struct ObservedSteps(RwLock<Observed>);

#[derive(Default)]
struct Observed {
    #[cfg_attr(not(feature = "train"), allow(dead_code))]
    is_between_steps: bool,
    #[cfg(feature = "train")]
    observer: Option<Arc<dyn RoutingObserver>>,
}

impl ObservedSteps {
    /// Between steps nothing is observed.
    pub fn set_between_steps(&self, on: bool) {
        self.0.write().is_between_steps = on;
    }

    #[cfg(feature = "train")]
    pub fn set_observer(&self, observer: Option<Arc<dyn RoutingObserver>>) {
        self.0.write().observer = observer;
    }

    /// Who learns the counts of a training pass that runs now.
    #[cfg(feature = "train")]
    pub fn observer(&self) -> Option<Arc<dyn RoutingObserver>> {
        let observed = self.0.read();
        observed.observer.clone().filter(|_| !observed.is_between_steps)
    }
}
