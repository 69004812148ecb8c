//! What users plug in is what runs.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
    mpsc,
};

use burn::tensor::{Distribution, Tensor};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::local::{LaunchConfig, RankError},
    moe::RouterForcing,
    train::{PlannerConfig, TrainingCallback},
};
use burn_fsep_planner::{
    Layout, PlannerError, PlannerStrategy, RoutingCounts, Topology,
    dispatch::{DispatchPlan, Dispatcher, EvenSplit},
    placement::{LayoutRequest, LayoutSolver},
    predictor::{LastStep, Predictor},
};
use burn_fsep_tests::{device, launch};

/// A layer of 4 experts in 2 slots a rank.
fn layer(runtime: &FsepRuntime) -> Result<FSEPMoE, FsepError> {
    let config = FSEPMoEConfig::new(4, 6, 4).with_slots_per_rank(Some(if runtime.world_size() == 1 { 4 } else { 2 }));
    config.with_moe_router_force(Some(RouterForcing::LoadBalancing)).try_init(runtime, &device())
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
#[derive(Debug)]
struct Adder {
    sum: Arc<AtomicUsize>,
    last: LastStep,
}

impl Predictor for Adder {
    fn name(&self) -> &'static str {
        "adder"
    }

    fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
        self.sum.fetch_add(counts.total() as usize, Ordering::Relaxed);
        self.last.observe(counts)
    }

    fn predict(&self) -> Option<RoutingCounts> {
        self.last.predict()
    }

    fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
        self.last.save(state)
    }

    fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
        self.last.load(state)
    }
}

/// Two steps of 20 tokens a rank, 2 experts a token; behind each a pass of 13 tokens without backward. Returns how many assignments
/// the planner has learned of.
fn learned(ranks: usize, begins_steps: bool) -> Vec<usize> {
    let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let layer = layer(&runtime)?;
        let sum = Arc::new(AtomicUsize::new(0));
        let adder = sum.clone();
        let mut planner = PlannerConfig::new(PlannerStrategy::MinMax)
            .with_synchronous(true)
            .with_predictor(move |_| Box::new(Adder { sum: adder.clone(), last: LastStep::new() }))
            .init();
        planner.on_train_start(&runtime)?;
        for _ in 0..2 {
            if begins_steps {
                runtime.begin_step(&layer)?;
            }
            step(&runtime, &layer)?;
            planner.step(&runtime)?;
            let look = layer.try_forward(Tensor::<2>::ones([13, 4], &device()))?;
            assert!(look.hidden.is_tracked());
        }
        planner.step(&runtime)?;
        Ok(sum.load(Ordering::Relaxed))
    });
    results.into_iter().map(Result::unwrap).collect()
}

#[test]
fn a_forward_pass_between_steps_is_not_observed() {
    assert_eq!(learned(1, true), [80]);
    assert_eq!(learned(2, true), [160; 2]);
}

#[test]
fn a_program_that_knows_no_steps_is_observed() {
    assert_eq!(learned(1, false), [80 + 2 * 26]);
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
        let config = PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true);
        let mut planner = config.with_solver(move |layer| Box::new(Fixed(given[layer].clone()))).init();
        planner.on_train_start(&runtime).unwrap();
        layers.iter().try_for_each(|layer| step(&runtime, layer))?;
        assert!((0..2).all(|layer| *runtime.layout(layer) != wanted[layer]));
        planner.step(&runtime).unwrap();
        assert!((0..2).all(|layer| *runtime.layout(layer) == wanted[layer]));
        layers.iter().try_for_each(|layer| step(&runtime, layer))?;
        Ok(runtime.stats().moved_slots())
    });
    results.into_iter().for_each(|moved| assert_eq!(moved.unwrap(), 4 + 2));
}

/// A solver that waits, where it was told to, until the sender is gone.
#[derive(Debug)]
struct Slow(Fixed, Option<Arc<Mutex<mpsc::Receiver<()>>>>);

impl LayoutSolver for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
        if let Some(wait) = &self.1 {
            let _ = wait.lock().unwrap().recv();
        }
        self.0.solve(request)
    }
}

#[test]
fn ranks_skip_the_same_counts_if_one_of_them_plans_slowly() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntimeConfig::new().with_repair(None).init(comm)?;
        let layer = layer(&runtime)?;
        let (before, wanted) = (runtime.layout(0), Layout::from_rows(4, &[vec![2, 3], vec![0, 1]])?);
        let (sender, receiver) = mpsc::channel();
        let wait = (runtime.rank() == 1).then(|| Arc::new(Mutex::new(receiver)));
        let solver = wanted.clone();
        let config = PlannerConfig::new(PlannerStrategy::MinMax)
            .with_solver(move |_| Box::new(Slow(Fixed(solver.clone()), wait.clone())));
        let mut planner = config.init();
        planner.on_train_start(&runtime)?;
        // Dropped before the planner, which waits for its thread, also where an assertion fails.
        let sender: mpsc::Sender<()> = sender;
        for _ in 0..10 {
            step(&runtime, &layer)?;
            planner.step(&runtime)?;
        }
        let report = planner.report();
        assert_eq!((report.adopted(), report.late(), report.skipped()), (0, 10, 8), "two steps' counts are taken");
        assert_eq!(runtime.layout(0), before);
        drop(sender);
        while runtime.layout(0) == before {
            step(&runtime, &layer)?;
            planner.step(&runtime)?;
        }
        assert_eq!(*runtime.layout(0), wanted);
        Ok((report.adopted(), report.late(), report.skipped()))
    });
    let reports: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    assert_eq!(reports[0], reports[1]);
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
