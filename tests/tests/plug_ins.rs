//! What users plug in is what runs.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use burn::tensor::{Distribution, Tensor};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::local::{LaunchConfig, RankError},
};
use burn_fsep_planner::{
    Layout, PlannerConfig, PlannerError, RoutingCounts, Strategy, Topology,
    callback::{PlannerHost, RoutingObserver, StepContext, TrainingCallback},
    dispatch::{DispatchPlan, Dispatcher, EvenSplit},
    placement::{LayoutRequest, LayoutSolver},
};
use burn_fsep_tests::{device, launch};

/// A layer of 4 experts in 2 slots a rank.
fn layer(runtime: &FsepRuntime) -> Result<FSEPMoE, FsepError> {
    let config = FSEPMoEConfig::new(4, 6, 4).with_slots_per_rank(Some(if runtime.world_size() == 1 { 4 } else { 2 }));
    config.with_moe_router_force_load_balancing(true).try_init(runtime, &device())
}

/// Runs it forward and backward once.
fn step(runtime: &FsepRuntime, layer: &FSEPMoE) -> Result<(), FsepError> {
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
        let runtime = config.init(comm)?;
        step(&runtime, &layer(&runtime)?)
    });
    results.into_iter().for_each(|result| result.unwrap());
    assert_eq!(calls.load(Ordering::Relaxed), 2, "one layer on each of two ranks");
}

/// Dispatches nothing.
#[derive(Debug)]
struct Idle;

impl Dispatcher for Idle {
    fn name(&self) -> &'static str {
        "idle"
    }

    fn dispatch(
        &mut self,
        _: &Topology,
        _: &Layout,
        counts: &RoutingCounts,
        plan: &mut DispatchPlan,
    ) -> Result<(), PlannerError> {
        plan.clear(counts.num_ranks(), counts.num_experts());
        (0..counts.num_ranks() * counts.num_experts()).for_each(|_| plan.end_pair());
        Ok(())
    }
}

#[test]
fn a_dispatcher_that_loses_tokens_is_an_error() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntimeConfig::new().with_dispatcher(|| Box::new(Idle)).init(comm)?;
        step(&runtime, &layer(&runtime)?)
    });
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("0 tokens dispatched"), "{error}");
    }
}

/// Adds up what it learns.
#[derive(Debug, Default)]
struct Observed(AtomicUsize);

impl RoutingObserver for Observed {
    fn observe(&self, _layer: usize, _step: u64, counts: &Arc<RoutingCounts>) {
        self.0.fetch_add(counts.total() as usize, Ordering::Relaxed);
    }
}

#[test]
fn a_forward_pass_between_steps_is_not_observed() {
    // Two steps of 20 tokens on each of 1 and 2 ranks, 2 experts a token; and 13 tokens in a pass without backward.
    for (ranks, ends_steps, expected) in [(1, true, 80), (1, false, 132), (2, true, 160)] {
        let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
            let runtime = FsepRuntime::new(comm)?;
            let layer = layer(&runtime)?;
            let observed = Arc::new(Observed::default());
            runtime.set_observer(Some(observed.clone()));
            for _ in 0..2 {
                runtime.begin_step(&layer)?;
                step(&runtime, &layer)?;
                if ends_steps {
                    runtime.end_step();
                }
                let look = layer.try_forward(Tensor::<2>::ones([13, 4], &device()))?;
                assert!(look.hidden.is_tracked());
            }
            Ok(observed.0.load(Ordering::Relaxed))
        });
        results.into_iter().for_each(|counts| assert_eq!(counts.unwrap(), expected));
    }
}

#[test]
fn a_program_that_knows_no_steps_is_observed() {
    let runtime = FsepRuntime::single();
    let layer = layer(&runtime).unwrap();
    let observed = Arc::new(Observed::default());
    runtime.set_observer(Some(observed.clone()));
    step(&runtime, &layer).unwrap();
    assert_eq!(observed.0.load(Ordering::Relaxed), 40);
}

/// Always answers with one layout.
#[derive(Debug)]
struct Fixed(Layout);

impl LayoutSolver for Fixed {
    fn name(&self) -> &'static str {
        "fixed"
    }

    fn solve(&mut self, _: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
        Ok(self.0.clone())
    }
}

#[test]
fn layouts_come_from_the_solver_that_is_given() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntimeConfig::new().with_repair(None).init(comm)?;
        let layers = [layer(&runtime)?, layer(&runtime)?];
        // Static expert parallelism starts with experts 0 and 1 on rank 0.
        let wanted = [vec![vec![2, 3], vec![0, 1]], vec![vec![0, 2], vec![1, 3]]];
        let wanted = wanted.map(|rows| Layout::from_rows(4, &rows).unwrap());
        let given = wanted.clone();
        let config = PlannerConfig::new(Strategy::MinMax).with_synchronous(true);
        let mut planner = config.with_solver(move |layer| Box::new(Fixed(given[layer].clone()))).init();
        planner.on_train_start(&runtime).unwrap();
        layers.iter().try_for_each(|layer| step(&runtime, layer))?;
        assert!((0..2).all(|layer| *runtime.layout(layer) != wanted[layer]));
        planner.on_step_end(&StepContext::new(1, 1, &runtime)).unwrap();
        assert!((0..2).all(|layer| *runtime.layout(layer) == wanted[layer]));
        layers.iter().try_for_each(|layer| step(&runtime, layer))?;
        Ok(runtime.stats().moved_slots())
    });
    results.into_iter().for_each(|moved| assert_eq!(moved.unwrap(), 4 + 2));
}

#[test]
fn nodes_may_have_different_numbers_of_ranks() {
    let results = launch(&LaunchConfig::new(3), |comm| -> Result<_, FsepError> {
        let uneven = Topology::new(&[1, 2])?;
        let config = FsepRuntimeConfig::new().with_topology(uneven.clone()).with_repair(None);
        let runtime = config.with_dispatcher(|| Box::new(EvenSplit::new())).init(comm)?;
        assert_eq!(runtime.topology(), &uneven);
        let layer = layer(&runtime)?;
        runtime.set_layout(0, Arc::new(Layout::from_rows(4, &[vec![0, 1], vec![0, 1], vec![2, 3]])?))?;
        step(&runtime, &layer)?;
        Ok(runtime.stats())
    });
    for stats in results.into_iter().map(Result::unwrap) {
        let layer = &stats.layers[0];
        // The second node has all experts, the first has none of 2 and 3.
        let crossing = layer.counts.get(0, 2) + layer.counts.get(0, 3);
        assert!(crossing > 0);
        assert_eq!(layer.cross_node_tokens, u64::from(crossing));
    }
}

#[test]
fn a_topology_has_to_be_that_of_the_group_and_the_only_one() {
    let base = FsepRuntimeConfig::new;
    let three = || Topology::new(&[2, 1]).unwrap();
    for (config, expected) in [
        (base().with_topology(three()), "`topology` has 3 ranks, but the group has 2"),
        (base().with_topology(three()).with_ranks_per_node(1), "`topology` and `ranks_per_node` both"),
    ] {
        for result in launch(&LaunchConfig::new(2), |comm| config.init(comm).map(|_| ())) {
            let Err(RankError::Failed { error: FsepError::Config(message), .. }) = result else { panic!("{result:?}") };
            assert!(message.contains(expected), "{message}");
        }
    }
}
