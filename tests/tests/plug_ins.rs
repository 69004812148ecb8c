//! What users plug in is what runs.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use burn::tensor::{Distribution, Tensor};
use burn_fsep::{FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig, comm::local::LaunchConfig};
use burn_fsep_planner::{
    Layout, PlannerError, RoutingCounts, Topology,
    dispatch::{DispatchPlan, Dispatcher, EvenSplit},
};
use burn_fsep_tests::{device, launch};

/// A layer of 4 experts that has run forward and backward once.
fn run_layer(runtime: &FsepRuntime) -> Result<(), FsepError> {
    let layer = FSEPMoEConfig::new(4, 6, 4).with_slots_per_rank(Some(3)).try_init(runtime, &device())?;
    runtime.run(|| {
        let x = Tensor::<2>::random([20, 4], Distribution::Default, &device());
        let _ = layer.forward(x).sum().backward();
    })
}

/// Counts its calls where it was told to.
#[derive(Debug)]
struct Counting(EvenSplit, Arc<AtomicUsize>);

impl Dispatcher for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }

    fn dispatch(
        &mut self,
        topology: &Topology,
        layout: &Layout,
        counts: &RoutingCounts,
        plan: &mut DispatchPlan,
    ) -> Result<(), PlannerError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.dispatch(topology, layout, counts, plan)
    }
}

#[test]
fn a_dispatcher_may_capture() {
    let calls = Arc::new(AtomicUsize::new(0));
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let calls = calls.clone();
        let config =
            FsepRuntimeConfig::new().with_dispatcher(move || Box::new(Counting(EvenSplit::new(), calls.clone())));
        assert!(format!("{config:?}").contains("dispatcher: counting"), "{config:?}");
        run_layer(&config.init(comm)?)
    });
    results.into_iter().for_each(|result| result.unwrap());
    assert_eq!(calls.load(Ordering::Relaxed), 2, "one layer on each of two ranks");
}
