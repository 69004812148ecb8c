use std::{fmt, sync::Arc};

use burn_fsep_planner::dispatch::{Dispatcher, MinMax};

/// Makes the dispatcher of each layer; the min-max dispatcher by default.
#[derive(Clone, Default)]
pub(super) struct DispatcherFactory {
    given: Option<Arc<dyn Fn() -> Box<dyn Dispatcher> + Send + Sync>>,
}

impl DispatcherFactory {
    pub fn new(make: impl Fn() -> Box<dyn Dispatcher> + Send + Sync + 'static) -> Self {
        Self { given: Some(Arc::new(make)) }
    }

    pub fn make(&self) -> Box<dyn Dispatcher> {
        self.given.as_ref().map_or_else(|| Box::new(MinMax::new()) as Box<dyn Dispatcher>, |make| make())
    }

    /// Whether the user gave it.
    pub fn is_given(&self) -> bool {
        self.given.is_some()
    }
}

impl fmt::Debug for DispatcherFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.make().name())
    }
}
