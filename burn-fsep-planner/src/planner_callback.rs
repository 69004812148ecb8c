use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use crate::{
    RoutingCounts,
    background::{BackgroundPlanner, PlannerStates},
    callback::{CallbackError, PlannerHost, RoutingObserver, StepContext, TrainingCallback},
    planner_config::PlannerConfig,
    planner_report::PlannerReport,
};

/// Plans new layouts from each step's routing counts and puts them into use between steps.
///
/// Every rank plans for itself from equal counts. Before a layout is used, the ranks agree on the newest that all of
/// them have, so all switch to the same layout in the same step.
#[derive(Debug)]
pub struct PlannerCallback {
    config: PlannerConfig,
    running: Option<Running>,
    /// From a checkpoint, until training starts.
    learned: PlannerStates,
    report: PlannerReport,
}

#[derive(Debug)]
struct Running {
    background: Arc<BackgroundPlanner>,
    forwarder: Arc<Forwarder>,
    /// Step whose layout each planned layer uses.
    in_use: BTreeMap<usize, u64>,
}

/// Hands routing counts to the planner.
#[derive(Debug)]
struct Forwarder {
    /// Weak: a callback that is gone plans no more, also if it was not told that training ended.
    background: Weak<BackgroundPlanner>,
    seen: Mutex<BTreeMap<usize, u64>>,
}

impl Forwarder {
    fn seen(&self) -> BTreeMap<usize, u64> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl RoutingObserver for Forwarder {
    fn observe(&self, layer: usize, step: u64, counts: &Arc<RoutingCounts>) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(layer, step);
        if let Some(background) = self.background.upgrade() {
            background.submit(layer, step, counts.clone());
        }
    }
}

impl PlannerCallback {
    pub(crate) fn new(config: PlannerConfig) -> Self {
        Self { config, running: None, learned: PlannerStates::new(), report: PlannerReport::default() }
    }

    /// A handle on what the planner did, for metrics; valid while and after training.
    pub fn report(&self) -> PlannerReport {
        self.report.clone()
    }

    fn start(&mut self, host: &dyn PlannerHost) -> Result<Running, CallbackError> {
        let learned = std::mem::take(&mut self.learned);
        let mut planners = BTreeMap::new();
        for layer in 0..host.num_layers() {
            if !host.is_plannable(layer) || self.config.is_static() {
                continue;
            }
            let initial = host.layout(layer).as_ref().clone();
            let mut planner = self.config.layer_planner(layer, host.topology(), initial);
            if let Some(state) = learned.get(&layer) {
                // Of no use with another number of ranks, for example: then it begins anew.
                planner.load(state)?;
            }
            planners.insert(layer, planner);
        }
        let background = Arc::new(BackgroundPlanner::start(planners)?);
        let forwarder = Arc::new(Forwarder { background: Arc::downgrade(&background), seen: Mutex::default() });
        host.set_observer(Some(forwarder.clone()));
        Ok(Running { background, forwarder, in_use: BTreeMap::new() })
    }
}

/// What the names of the planner's records begin with; the layer's number follows.
const RECORD: &str = "planner.layer-";

impl TrainingCallback for PlannerCallback {
    fn on_resume(&mut self, records: &BTreeMap<String, Vec<u8>>) -> Result<(), CallbackError> {
        let layer = |name: &str| name.strip_prefix(RECORD)?.parse().ok();
        self.learned = records.iter().filter_map(|(name, state)| Some((layer(name)?, state.clone()))).collect();
        Ok(())
    }

    fn on_train_start(&mut self, host: &dyn PlannerHost) -> Result<(), CallbackError> {
        self.running = Some(self.start(host)?);
        Ok(())
    }

    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), CallbackError> {
        let host = context.host;
        if self.running.is_none() {
            // A loop that does not call `on_train_start`: plan from the second step on.
            self.running = Some(self.start(host)?);
        }
        let Some(Running { background, forwarder, in_use }) = &mut self.running else { return Ok(()) };
        let seen = forwarder.seen();
        if self.config.synchronous {
            for (&layer, &step) in &seen {
                background.wait_for(layer, step)?;
            }
        }
        let (layers, newest): (Vec<_>, Vec<_>) = background.newest_steps()?.into_iter().unzip();
        let agreed = host.agree_min(&newest)?;
        let mut data = self.report.data();
        for (layer, step) in layers.into_iter().zip(agreed) {
            if step < seen.get(&layer).copied().unwrap_or(0) {
                data.late += 1;
            }
            if step > in_use.get(&layer).copied().unwrap_or(0)
                && let Some(layout) = background.take(layer, step)
            {
                host.set_layout(layer, layout)?;
                in_use.insert(layer, step);
                data.adopted += 1;
            }
        }
        data.solve_time = background.solve_times().into_iter().map(|(_, time)| time).sum();
        self.report.set(data);
        Ok(())
    }

    fn on_checkpoint(&mut self, records: &mut BTreeMap<String, Vec<u8>>) -> Result<(), CallbackError> {
        // Those of a checkpoint that this training went on from may be of layers that are not planned any more.
        records.retain(|name, _| !name.starts_with(RECORD));
        if let Some(Running { background, .. }) = &self.running {
            let states = background.save()?;
            records.extend(states.into_iter().map(|(layer, state)| (format!("{RECORD}{layer}"), state)));
        }
        Ok(())
    }

    fn on_train_end(&mut self, host: &dyn PlannerHost) -> Result<(), CallbackError> {
        host.set_observer(None);
        self.running = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Layout, PlannerError, Strategy, Topology,
        placement::{LayoutRequest, LayoutSolver},
        predictor::{LastStep, Predictor},
    };

    /// A runtime of one rank and one layer, whose peer is `behind` steps late.
    #[derive(Debug)]
    struct Host {
        layout: Mutex<Arc<Layout>>,
        observer: Mutex<Option<Arc<dyn RoutingObserver>>>,
        behind: u64,
    }

    impl Host {
        fn new(behind: u64) -> Self {
            let layout = Arc::new(Layout::static_ep(4, 2, 4).unwrap());
            Self { layout: Mutex::new(layout), observer: Mutex::default(), behind }
        }

        fn step(&self, callback: &mut PlannerCallback, step: u64) {
            let counts = Arc::new(RoutingCounts::from_rows(&vec![vec![70, 10, 10, 10]; 4]).unwrap());
            self.observer.lock().unwrap().as_ref().unwrap().observe(0, step, &counts);
            callback.on_step_end(&StepContext::new(1, step as usize, self)).unwrap();
        }
    }

    impl PlannerHost for Host {
        fn num_layers(&self) -> usize {
            1
        }

        fn topology(&self) -> Topology {
            Topology::single_node(4).unwrap()
        }

        fn layout(&self, _: usize) -> Arc<Layout> {
            self.layout.lock().unwrap().clone()
        }

        fn is_plannable(&self, _: usize) -> bool {
            true
        }

        fn set_layout(&self, _: usize, layout: Arc<Layout>) -> Result<(), CallbackError> {
            *self.layout.lock().unwrap() = layout;
            Ok(())
        }

        fn set_observer(&self, observer: Option<Arc<dyn RoutingObserver>>) {
            *self.observer.lock().unwrap() = observer;
        }

        fn agree_min(&self, values: &[u64]) -> Result<Vec<u64>, CallbackError> {
            Ok(values.iter().map(|v| v.saturating_sub(self.behind)).collect())
        }
    }

    fn callback(host: &Host) -> PlannerCallback {
        let mut callback = PlannerConfig::new(Strategy::MinMax).with_synchronous(true).init();
        callback.on_train_start(host).unwrap();
        callback
    }

    #[test]
    fn a_new_layout_is_used_after_the_step_that_it_comes_from() {
        let host = Host::new(0);
        let before = host.layout(0);
        let mut callback = callback(&host);
        host.step(&mut callback, 1);
        assert_ne!(host.layout(0), before);
        assert!(host.layout(0).replicas(0) > before.replicas(0));
        assert_eq!((callback.report().adopted(), callback.report().late()), (1, 0));
    }

    #[test]
    fn a_callback_that_goes_on_from_a_checkpoint_plans_as_the_one_that_stopped() {
        let counts = |step: u64| {
            let row = (0..4).map(|e| 10 + (step as u32 * (e + 3) + e * e * 17) % 61).collect::<Vec<_>>();
            Arc::new(RoutingCounts::from_rows(&vec![row; 4]).unwrap())
        };
        let step = |host: &Host, callback: &mut PlannerCallback, number: u64, step: u64| {
            host.observer.lock().unwrap().as_ref().unwrap().observe(0, number, &counts(step));
            callback.on_step_end(&StepContext::new(1, step as usize, host)).unwrap();
        };
        let host = Host::new(0);
        let mut stopped = callback(&host);
        (1..=20).for_each(|number| step(&host, &mut stopped, number, number));
        let mut records = BTreeMap::from([("planner.layer-7".to_string(), vec![1]), ("of the user".into(), vec![2])]);
        stopped.on_checkpoint(&mut records).unwrap();
        assert_eq!(records.keys().collect::<Vec<_>>(), ["of the user", "planner.layer-0"]);

        let other = Host::new(0);
        *other.layout.lock().unwrap() = host.layout(0);
        let mut resumed = PlannerConfig::new(Strategy::MinMax).with_synchronous(true).init();
        resumed.on_resume(&records).unwrap();
        resumed.on_train_start(&other).unwrap();
        let mut layouts = std::collections::BTreeSet::new();
        for number in 1..=20 {
            step(&host, &mut stopped, 20 + number, 20 + number);
            step(&other, &mut resumed, number, 20 + number);
            assert_eq!(other.layout(0), host.layout(0), "step {number}");
            layouts.insert(host.layout(0).as_slice().to_vec());
        }
        assert!(layouts.len() > 2, "the layout hardly changes");
    }

    #[test]
    fn a_rank_that_is_late_makes_the_others_keep_their_layout() {
        let host = Host::new(1);
        let before = host.layout(0);
        let mut callback = callback(&host);
        host.step(&mut callback, 1);
        assert_eq!(host.layout(0), before);
        assert_eq!((callback.report().adopted(), callback.report().late()), (0, 1));
        host.step(&mut callback, 2);
        assert_ne!(host.layout(0), before, "the layout of the first step, which the late rank now has");
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
    }

    impl LayoutSolver for Turning {
        fn name(&self) -> &'static str {
            "turning"
        }

        fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
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
            *self.1.lock().unwrap() += 1;
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
        let observed = Arc::new(Mutex::new(0));
        let counter = observed.clone();
        // Whatever the strategy: also one that by itself would never plan.
        let config = PlannerConfig::new(Strategy::Static)
            .with_synchronous(true)
            .with_solver(|layer| Box::new(Turning { layer, turns: 0 }))
            .with_predictor(move |_| Box::new(Counting(LastStep::new(), counter.clone())));
        let host = Host::new(0);
        let mut callback = config.init();
        callback.on_train_start(&host).unwrap();
        for step in 1..=6 {
            host.step(&mut callback, step);
            assert_eq!(*host.layout(0), turned(step as usize));
        }
        let mut records = BTreeMap::new();
        callback.on_checkpoint(&mut records).unwrap();

        let mut resumed = config.init();
        resumed.on_resume(&records).unwrap();
        resumed.on_train_start(&host).unwrap();
        host.step(&mut resumed, 1);
        assert_eq!(*host.layout(0), turned(7), "the solver goes on from the 6 turns that it had made");
        assert_eq!(*observed.lock().unwrap(), 7);
    }

    #[test]
    fn a_callback_that_is_dropped_plans_no_more() {
        let host = Host::new(0);
        let callback = callback(&host);
        let background = Arc::downgrade(&callback.running.as_ref().unwrap().background);
        drop(callback);
        assert!(background.upgrade().is_none(), "its thread has ended though the host still has the observer");
        let counts = Arc::new(RoutingCounts::from_rows(&vec![vec![1; 4]; 4]).unwrap());
        host.observer.lock().unwrap().as_ref().unwrap().observe(0, 1, &counts);
    }
}
