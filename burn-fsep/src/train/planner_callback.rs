use std::{collections::BTreeMap, sync::Arc};

use burn_fsep_planner::{BackgroundPlanner, PendingStates, PlannerStates};

use super::{PlannerConfig, PlannerReport, StepContext, TrainingCallback};
use crate::{
    FsepError, FsepRuntime,
    comm::{Operation, all_gather_u64},
};

/// Plans new layouts from each step's routing counts and puts them into use between steps.
///
/// Every rank plans for itself from equal counts. Before a layout is used, the ranks agree on the newest that all of
/// them have, so all switch to the same layout in the same step. Where the planner is slower than the training, on any rank,
/// counts are skipped on all ranks alike; see [`BackgroundPlanner`].
///
/// A training strategy takes it as a callback. In a loop of your own, call [`step`](Self::step) after each optimizer step.
#[derive(Debug)]
pub struct PlannerCallback {
    config: PlannerConfig,
    running: Option<Arc<BackgroundPlanner>>,
    /// From a checkpoint, until training starts.
    learned: PlannerStates,
    /// What it had learned when the last window of accumulated gradients began.
    window: Option<PendingStates>,
    report: PlannerReport,
}

impl PlannerCallback {
    pub(super) fn new(config: PlannerConfig) -> Self {
        Self { config, running: None, learned: PlannerStates::new(), window: None, report: PlannerReport::default() }
    }

    /// A handle on what the planner did, for metrics; valid while and after training.
    pub fn report(&self) -> PlannerReport {
        self.report.clone()
    }

    /// Ends a step: puts the layouts into use that all ranks have by now. Collective.
    ///
    /// The first call starts the planner, unless [`on_train_start`](TrainingCallback::on_train_start) did: then the step before
    /// it is not planned from.
    ///
    /// # Errors
    ///
    /// [`FsepError::Planner`] if a solver or predictor failed, [`FsepError::Comm`] if a rank is lost.
    pub fn step(&mut self, runtime: &FsepRuntime) -> Result<(), FsepError> {
        runtime.end_step();
        self.adopt(runtime)
    }

    /// [`step`](Self::step) for a loop that has ended the runtime's step by itself.
    pub(super) fn adopt(&mut self, runtime: &FsepRuntime) -> Result<(), FsepError> {
        let planner = match &self.running {
            Some(planner) => planner.clone(),
            None => self.start(runtime)?,
        };
        if self.config.synchronous {
            planner.wait()?;
        }
        let agreed = planner.agree(&smallest(runtime, planner.newest()?)?);
        let adopted = agreed.layouts.len() as u64;
        for (layer, layout) in agreed.layouts {
            runtime.set_layout(layer, layout)?;
        }
        self.report.update(|report| {
            report.adopted += adopted;
            report.late += agreed.late;
            report.skipped += agreed.skipped;
            report.solve_time = planner.solve_time();
        });
        Ok(())
    }

    fn start(&mut self, runtime: &FsepRuntime) -> Result<Arc<BackgroundPlanner>, FsepError> {
        self.running = None;
        let learned = std::mem::take(&mut self.learned);
        let mut planners = BTreeMap::new();
        for layer in 0..runtime.num_layers() {
            if runtime.has_fixed_layout(layer) || self.config.is_static() {
                continue;
            }
            let initial = runtime.layout(layer).as_ref().clone();
            let mut planner = self.config.layer_planner(layer, runtime.topology().clone(), initial);
            if let Some(state) = learned.get(&layer) {
                // Of no use with another number of ranks, for example: then it begins anew.
                planner.load(state)?;
            }
            planners.insert(layer, planner);
        }
        let planner = Arc::new(BackgroundPlanner::start(planners)?);
        runtime.set_planner(Arc::downgrade(&planner))?;
        Ok(self.running.insert(planner).clone())
    }
}

/// The element-wise minimum of the `values` of the ranks that share the experts, which are equally many.
fn smallest(runtime: &FsepRuntime, mut values: Vec<u64>) -> Result<Vec<u64>, FsepError> {
    if values.is_empty() {
        return Ok(values);
    }
    let group = runtime.groups().experts().as_ref();
    let all = all_gather_u64(group, Operation::new("agreement on layouts"), &values)?;
    for theirs in all.chunks_exact(values.len()) {
        values.iter_mut().zip(theirs).for_each(|(value, &theirs)| *value = theirs.min(*value));
    }
    Ok(values)
}

/// What the names of the planner's records begin with; the layer's number follows.
const RECORD: &str = "planner.layer-";

impl TrainingCallback for PlannerCallback {
    fn on_resume(&mut self, records: &BTreeMap<String, Vec<u8>>) -> Result<(), FsepError> {
        let layer = |name: &str| name.strip_prefix(RECORD)?.parse().ok();
        self.learned = records.iter().filter_map(|(name, state)| Some((layer(name)?, state.clone()))).collect();
        Ok(())
    }

    fn on_train_start(&mut self, runtime: &FsepRuntime) -> Result<(), FsepError> {
        self.start(runtime).map(|_| ())
    }

    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        self.adopt(context.runtime)
    }

    fn on_window_start(&mut self, _: &FsepRuntime) -> Result<(), FsepError> {
        self.window = self.running.as_ref().map(|planner| planner.start_save());
        Ok(())
    }

    fn on_window_discarded(&mut self, runtime: &FsepRuntime) -> Result<(), FsepError> {
        if let Some(states) = self.window.take() {
            self.learned = states.wait()?;
            self.start(runtime)?;
        }
        Ok(())
    }

    fn on_checkpoint(&mut self, records: &mut BTreeMap<String, Vec<u8>>) -> Result<(), FsepError> {
        // Those of a checkpoint that this training went on from may be of layers that are not planned any more.
        records.retain(|name, _| !name.starts_with(RECORD));
        if let Some(planner) = &self.running {
            let states = planner.save()?;
            records.extend(states.into_iter().map(|(layer, state)| (format!("{RECORD}{layer}"), state)));
        }
        Ok(())
    }

    fn on_train_end(&mut self, _: &FsepRuntime) -> Result<(), FsepError> {
        // The runtime has no share in it.
        self.running = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};
    use burn_fsep_planner::{
        Layout, PlannerError, PlannerStrategy, RoutingCounts,
        placement::{LayoutRequest, LayoutSolver},
        predictor::{LastStep, Predictor},
    };
    use parking_lot::Mutex;

    use super::*;
    use crate::{
        FSEPMoE, FSEPMoEConfig, FsepRuntimeConfig,
        comm::local::{LaunchConfig, launch},
    };

    /// Runs on 4 ranks with a layer each of 4 experts in 2 slots a rank.
    fn on_ranks(run: impl Fn(&FsepRuntime, &FSEPMoE) + Sync) {
        let results = launch(&LaunchConfig::new(4), |comm| -> Result<(), FsepError> {
            let runtime = FsepRuntimeConfig::new().with_repair(None).init(comm)?;
            let config = FSEPMoEConfig::new(4, 6, 4).with_slots_per_rank(Some(2));
            let layer = config.try_init(&runtime, &Device::flex().autodiff())?;
            run(&runtime, &layer);
            Ok(())
        });
        results.into_iter().for_each(|result| result.unwrap());
    }

    fn synchronous() -> PlannerConfig {
        PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true)
    }

    fn started(config: &PlannerConfig, runtime: &FsepRuntime) -> PlannerCallback {
        let mut callback = config.init();
        callback.on_train_start(runtime).unwrap();
        callback
    }

    /// A step whose forward pass had these counts.
    fn step(runtime: &FsepRuntime, callback: &mut PlannerCallback, pass: u64, row: Vec<u32>) {
        let counts = Arc::new(RoutingCounts::from_rows(&vec![row; 4]).unwrap());
        callback.running.as_ref().unwrap().submit(0, pass, counts);
        callback.step(runtime).unwrap();
    }

    fn skewed() -> Vec<u32> {
        vec![70, 10, 10, 10]
    }

    #[test]
    fn a_new_layout_is_used_after_the_step_that_it_comes_from() {
        on_ranks(|runtime, _| {
            let before = runtime.layout(0);
            let mut callback = started(&synchronous(), runtime);
            step(runtime, &mut callback, 1, skewed());
            assert!(runtime.layout(0).replicas(0) > before.replicas(0));
            let report = callback.report();
            assert_eq!((report.adopted(), report.late(), report.skipped()), (1, 0, 0));
        });
    }

    #[test]
    fn a_loop_that_only_calls_step_plans_from_its_second_step_on() {
        on_ranks(|runtime, layer| {
            let mut callback = synchronous().init();
            for expected in [0, 1] {
                let x = Tensor::<2>::ones([20, 4], &Device::flex().autodiff());
                runtime.run(|| drop(layer.forward(x).sum().backward())).unwrap();
                callback.step(runtime).unwrap();
                assert_eq!(callback.report().adopted(), expected);
            }
        });
    }

    #[test]
    fn a_callback_that_goes_on_from_a_checkpoint_plans_as_the_one_that_stopped() {
        let row = |step: u64| (0..4).map(|e| 10 + (step as u32 * (e + 3) + e * e * 17) % 61).collect::<Vec<_>>();
        on_ranks(|runtime, _| {
            let mut stopped = started(&synchronous(), runtime);
            (1..=20).for_each(|number| step(runtime, &mut stopped, number, row(number)));
            let mut records =
                BTreeMap::from([("planner.layer-7".to_string(), vec![1]), ("of the user".into(), vec![2])]);
            stopped.on_checkpoint(&mut records).unwrap();
            assert_eq!(records.keys().collect::<Vec<_>>(), ["of the user", "planner.layer-0"]);

            let at_checkpoint = runtime.layout(0);
            let go_on = |callback: &mut PlannerCallback, first: u64| -> Vec<Arc<Layout>> {
                let layouts = (0..20).map(|number| {
                    step(runtime, callback, first + number, row(21 + number));
                    runtime.layout(0)
                });
                layouts.collect()
            };
            let expected = go_on(&mut stopped, 21);
            drop(stopped);
            runtime.set_layout(0, at_checkpoint).unwrap();
            let mut resumed = synchronous().init();
            resumed.on_resume(&records).unwrap();
            resumed.on_train_start(runtime).unwrap();
            assert_eq!(go_on(&mut resumed, 1), expected);
            let different: std::collections::BTreeSet<_> = expected.iter().map(|layout| layout.as_slice()).collect();
            assert!(different.len() > 2, "the layout hardly changes");
        });
    }

    #[test]
    fn a_callback_goes_back_to_where_a_discarded_window_began() {
        let records = |callback: &mut PlannerCallback| {
            let mut records = BTreeMap::new();
            callback.on_checkpoint(&mut records).unwrap();
            records
        };
        on_ranks(|runtime, _| {
            let mut callback = started(&synchronous(), runtime);
            (1..=3).for_each(|pass| step(runtime, &mut callback, pass, skewed()));
            let before = records(&mut callback);
            callback.on_window_start(runtime).unwrap();
            (4..=5).for_each(|pass| step(runtime, &mut callback, pass, vec![10, 10, 10, 70]));
            assert_ne!(records(&mut callback), before);
            callback.on_window_discarded(runtime).unwrap();
            assert_eq!(records(&mut callback), before);
            // It plans on.
            step(runtime, &mut callback, 6, vec![10, 10, 10, 70]);
            assert_ne!(records(&mut callback), before);
        });
    }

    #[test]
    fn a_window_begins_without_waiting_for_the_planner() {
        on_ranks(|runtime, _| {
            let (leave, wait) = std::sync::mpsc::channel::<()>();
            let wait = Arc::new(Mutex::new(wait));
            let config = PlannerConfig::new(PlannerStrategy::MinMax)
                .with_solver(move |_| Box::new(Turning { layer: 0, turns: 0, wait: Some(wait.clone()) }));
            let mut callback = started(&config, runtime);
            // Dropped before the callback, which waits for its thread, also where an assertion fails.
            let leave = leave;
            step(runtime, &mut callback, 1, skewed());
            callback.on_window_start(runtime).unwrap();
            drop(leave);
        });
    }

    #[test]
    fn a_rank_that_is_late_makes_the_others_keep_their_layout() {
        on_ranks(|runtime, _| {
            let (leave, wait) = std::sync::mpsc::channel::<()>();
            let wait = Arc::new(Mutex::new(wait));
            let is_late = runtime.rank() == 2;
            let config = PlannerConfig::new(PlannerStrategy::MinMax)
                .with_solver(move |_| Box::new(Turning { layer: 0, turns: 0, wait: is_late.then(|| wait.clone()) }));
            let before = runtime.layout(0);
            let mut callback = started(&config, runtime);
            // Dropped before the callback, which waits for its thread, also where an assertion fails.
            let leave = leave;
            step(runtime, &mut callback, 1, skewed());
            assert_eq!(runtime.layout(0), before);
            assert_eq!((callback.report().adopted(), callback.report().late()), (0, 1));
            // Two steps' counts are taken, then none until the late rank has caught up.
            (2..=9).for_each(|pass| step(runtime, &mut callback, pass, skewed()));
            assert_eq!(runtime.layout(0), before);
            assert_eq!((callback.report().late(), callback.report().skipped()), (9, 7));
            drop(leave);
            callback.running.as_ref().unwrap().wait().unwrap();
            callback.step(runtime).unwrap();
            assert_eq!(*runtime.layout(0), turned(2), "the layout of the second step, which the late rank now has");
            step(runtime, &mut callback, 10, skewed());
            assert_eq!((callback.report().late() <= 10, callback.report().skipped()), (true, 7));
        });
    }

    /// A layout with its ranks' rows turned so many times.
    fn turned(turns: usize) -> Layout {
        let mut rows = [vec![0, 1], vec![1, 2], vec![2, 3], vec![3, 0]];
        rows.rotate_left(turns % 4);
        Layout::from_rows(4, &rows).unwrap()
    }

    /// Turns the layout by one each time, and remembers how often it did.
    #[derive(Debug)]
    struct Turning {
        layer: usize,
        turns: u32,
        /// Each turn waits for a message, or for the end of the sender.
        wait: Option<Arc<Mutex<std::sync::mpsc::Receiver<()>>>>,
    }

    impl LayoutSolver for Turning {
        fn name(&self) -> &'static str {
            "turning"
        }

        fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
            if let Some(wait) = &self.wait {
                let _ = wait.lock().recv();
            }
            self.turns += 1;
            assert_eq!((request.topology.world_size(), request.slots_per_rank), (4, 2));
            Ok(turned(self.turns as usize))
        }

        fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
            state.extend([self.layer as u8, self.turns as u8]);
            Ok(())
        }

        fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
            let Some(([layer, turns], rest)) = state.split_first_chunk() else {
                return Err(PlannerError::State("it has no turns".into()));
            };
            assert_eq!(usize::from(*layer), self.layer);
            (self.turns, *state) = (u32::from(*turns), rest);
            Ok(())
        }
    }

    /// A [`LastStep`] that counts its observations where it was told to.
    #[derive(Debug)]
    struct Counting(LastStep, Arc<Mutex<u32>>);

    impl Predictor for Counting {
        fn name(&self) -> &'static str {
            "counting"
        }

        fn observe(&mut self, counts: &RoutingCounts) -> Result<(), PlannerError> {
            *self.1.lock() += 1;
            self.0.observe(counts)
        }

        fn predict(&self) -> Option<RoutingCounts> {
            self.0.predict()
        }

        fn save(&self, state: &mut Vec<u8>) -> Result<(), PlannerError> {
            self.0.save(state)
        }

        fn load(&mut self, state: &mut &[u8]) -> Result<(), PlannerError> {
            self.0.load(state)
        }
    }

    #[test]
    fn a_solver_and_a_predictor_of_the_user_plan_and_their_state_is_kept() {
        on_ranks(|runtime, _| {
            let observed = Arc::new(Mutex::new(0));
            let counter = observed.clone();
            // Whatever the strategy: also one that by itself would never plan.
            let config = PlannerConfig::new(PlannerStrategy::Static)
                .with_synchronous(true)
                .with_solver(|layer| Box::new(Turning { layer, turns: 0, wait: None }))
                .with_predictor(move |_| Box::new(Counting(LastStep::new(), counter.clone())));
            let mut callback = started(&config, runtime);
            for pass in 1..=6 {
                step(runtime, &mut callback, pass, skewed());
                assert_eq!(*runtime.layout(0), turned(pass as usize));
            }
            let mut records = BTreeMap::new();
            callback.on_checkpoint(&mut records).unwrap();
            drop(callback);

            let mut resumed = config.init();
            resumed.on_resume(&records).unwrap();
            resumed.on_train_start(runtime).unwrap();
            step(runtime, &mut resumed, 1, skewed());
            assert_eq!(*runtime.layout(0), turned(7), "the solver goes on from the 6 turns that it had made");
            assert_eq!(*observed.lock(), 7);
        });
    }

    #[test]
    fn a_callback_that_is_dropped_plans_no_more() {
        on_ranks(|runtime, layer| {
            let callback = started(&synchronous(), runtime);
            let planner = Arc::downgrade(callback.running.as_ref().unwrap());
            drop(callback);
            assert!(planner.upgrade().is_none(), "its thread has ended though the runtime was told of it");
            let x = Tensor::<2>::ones([20, 4], &Device::flex().autodiff());
            runtime.run(|| drop(layer.forward(x).sum().backward())).unwrap();
        });
    }
}
