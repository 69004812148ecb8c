//! The background planner: plans on a thread of its own while the device computes.

use std::{
    collections::{BTreeMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{Layout, PlannerError, RoutingCounts, planner::LayerPlanner};

/// Plans layers on a thread of its own.
///
/// A layer's counts are handed over as soon as its forward pass knows them, so planning hides behind the rest of
/// forward and backward. Layouts are numbered by the step whose counts they come from, per layer and from 1, and kept
/// until a later one was taken, so that ranks can agree on the newest that all of them have.
#[derive(Debug)]
pub struct BackgroundPlanner {
    /// `None` once the planner is shutting down.
    requests: Option<mpsc::Sender<Request>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Request {
    Plan { layer: usize, step: u64, counts: Arc<RoutingCounts> },
    Save(mpsc::Sender<Result<PlannerStates, PlannerError>>),
}

/// What planners have learned, by layer; see [`LayerPlanner::save`].
pub type PlannerStates = BTreeMap<usize, Vec<u8>>;

#[derive(Debug, Default)]
struct Shared {
    results: Mutex<Results>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Results {
    layers: BTreeMap<usize, LayerResults>,
    error: Option<PlannerError>,
    stopped: bool,
}

/// What the planner has done for a layer.
#[derive(Debug, Default)]
struct LayerResults {
    ready: VecDeque<(u64, Arc<Layout>)>,
    newest: u64,
    solve_time: Duration,
}

impl BackgroundPlanner {
    /// Starts the thread. `planners` are the layers to plan, by layer index.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Stopped`] if the thread cannot be started.
    pub fn start(planners: BTreeMap<usize, LayerPlanner>) -> Result<Self, PlannerError> {
        let (requests, inbox) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let layers = planners.keys().map(|&layer| (layer, LayerResults::default())).collect();
        shared.lock().layers = layers;
        let thread = std::thread::Builder::new()
            .name("fsep-planner".into())
            .spawn({
                let shared = shared.clone();
                move || serve(planners, &inbox, &shared)
            })
            .map_err(|error| PlannerError::Stopped(format!("its thread could not be started: {error}")))?;
        Ok(Self { requests: Some(requests), shared, thread: Some(thread) })
    }

    /// Hands over a layer's counts of a step; returns at once. Layers that are not planned are ignored.
    pub fn submit(&self, layer: usize, step: u64, counts: Arc<RoutingCounts>) {
        if let Some(requests) = &self.requests {
            // Fails only if the thread is gone, which `newest_steps` reports.
            let _ = requests.send(Request::Plan { layer, step, counts });
        }
    }

    /// The newest step that each planned layer has a layout from, in layer order; 0 is none.
    ///
    /// # Errors
    ///
    /// The error that stopped the planner, if one did.
    pub fn newest_steps(&self) -> Result<Vec<(usize, u64)>, PlannerError> {
        let results = self.shared.lock();
        results.check()?;
        Ok(results.layers.iter().map(|(&layer, results)| (layer, results.newest)).collect())
    }

    /// Waits until the layer's layout from `step` is there: for runs that must be reproducible.
    ///
    /// # Errors
    ///
    /// The error that stopped the planner, if one did.
    pub fn wait_for(&self, layer: usize, step: u64) -> Result<(), PlannerError> {
        let mut results = self.shared.lock();
        loop {
            results.check()?;
            match results.layers.get(&layer) {
                Some(layer) if layer.newest < step => {}
                _ => return Ok(()),
            }
            results = self.shared.changed.wait(results).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a layer's layout from `step` and forgets older ones.
    pub fn take(&self, layer: usize, step: u64) -> Option<Arc<Layout>> {
        let mut results = self.shared.lock();
        let ready = &mut results.layers.get_mut(&layer)?.ready;
        while ready.front().is_some_and(|(s, _)| *s < step) {
            ready.pop_front();
        }
        ready.front().filter(|(s, _)| *s == step).map(|(_, layout)| layout.clone())
    }

    /// What the planners have learned from all counts that were handed over; waits until they have.
    ///
    /// # Errors
    ///
    /// The error that stopped the planner, if one did; [`PlannerError::State`] if a state cannot be written.
    pub fn save(&self) -> Result<PlannerStates, PlannerError> {
        let (reply, states) = mpsc::channel();
        let asked = self.requests.as_ref().is_some_and(|requests| requests.send(Request::Save(reply)).is_ok());
        if let (true, Ok(states)) = (asked, states.recv()) {
            return states;
        }
        self.shared.lock().check()?;
        Err(PlannerError::Stopped("its thread ended".into()))
    }

    /// How long each planned layer's last solution took, in layer order.
    pub fn solve_times(&self) -> Vec<(usize, Duration)> {
        self.shared.lock().layers.iter().map(|(&layer, results)| (layer, results.solve_time)).collect()
    }
}

impl Drop for BackgroundPlanner {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the planner was caught and reported before.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Results {
    fn check(&self) -> Result<(), PlannerError> {
        match (&self.error, self.stopped) {
            (Some(error), _) => Err(error.clone()),
            (None, true) => Err(PlannerError::Stopped("its thread ended".into())),
            (None, false) => Ok(()),
        }
    }
}

fn serve(mut planners: BTreeMap<usize, LayerPlanner>, inbox: &mpsc::Receiver<Request>, shared: &Shared) {
    while let Ok(request) = inbox.recv() {
        let (layer, step, counts) = match request {
            Request::Plan { layer, step, counts } => (layer, step, counts),
            Request::Save(reply) => {
                let save = || planners.iter().map(|(&layer, planner)| Ok((layer, planner.save()?))).collect();
                let states = catch_unwind(AssertUnwindSafe(save)).unwrap_or_else(|_| {
                    Err(PlannerError::Stopped("saving the state of a solver or predictor panicked".into()))
                });
                // Nobody waits any more if the training has ended.
                let _ = reply.send(states);
                continue;
            }
        };
        let Some(planner) = planners.get_mut(&layer) else { continue };
        let start = Instant::now();
        let planned = catch_unwind(AssertUnwindSafe(|| planner.plan(&counts).cloned()));
        let solve_time = start.elapsed();
        let mut results = shared.lock();
        match planned {
            Ok(Ok(layout)) => {
                let layer = results.layers.entry(layer).or_default();
                layer.ready.push_back((step, Arc::new(layout)));
                layer.newest = step;
                layer.solve_time = solve_time;
            }
            Ok(Err(error)) => results.error = Some(error),
            Err(_) => results.error = Some(PlannerError::Stopped("the layout solver panicked".into())),
        }
        let failed = results.error.is_some();
        drop(results);
        shared.changed.notify_all();
        if failed {
            break;
        }
    }
    shared.lock().stopped = true;
    shared.changed.notify_all();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Topology,
        placement::{LayoutRequest, LayoutSolver},
        planner::Strategy,
        predictor::LastStep,
    };

    fn planner(solver: Box<dyn LayoutSolver>) -> BackgroundPlanner {
        let initial = Layout::static_ep(2, 2, 2).unwrap();
        let topology = Topology::single_node(2).unwrap();
        let layer = LayerPlanner::new(topology, initial, Box::new(LastStep::new()), solver);
        BackgroundPlanner::start(BTreeMap::from([(3, layer)])).unwrap()
    }

    fn counts() -> Arc<RoutingCounts> {
        Arc::new(RoutingCounts::from_rows(&[vec![5, 1], vec![2, 2]]).unwrap())
    }

    #[test]
    fn layouts_are_kept_until_a_later_one_is_taken() {
        let background = planner(Strategy::Paper.solver(0));
        assert_eq!(background.newest_steps().unwrap(), [(3, 0)]);
        for step in 1..=3 {
            background.submit(3, step, counts());
        }
        background.submit(4, 1, counts());
        background.wait_for(3, 3).unwrap();
        assert_eq!(background.newest_steps().unwrap(), [(3, 3)]);
        assert!(background.take(3, 2).is_some());
        assert!(background.take(3, 1).is_none());
        assert!(background.take(3, 3).is_some());
        assert!(background.solve_times()[0].1 > Duration::ZERO);
    }

    #[derive(Debug)]
    struct Broken(bool);

    impl LayoutSolver for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }

        fn solve(&mut self, _: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
            if self.0 {
                panic!("broken on purpose");
            }
            Err(PlannerError::Zero { what: "luck" })
        }

        fn save(&self, _: &mut Vec<u8>) -> Result<(), PlannerError> {
            panic!("broken on purpose");
        }
    }

    #[test]
    fn a_state_that_cannot_be_saved_is_reported_and_planning_goes_on() {
        let background = planner(Box::new(Broken(false)));
        for _ in 0..2 {
            let error = background.save().unwrap_err();
            assert!(error.to_string().contains("saving the state"), "{error}");
        }
    }

    #[test]
    fn errors_and_panics_of_the_thread_are_reported() {
        for (panics, expected) in [(false, "luck"), (true, "panicked")] {
            let background = planner(Box::new(Broken(panics)));
            background.submit(3, 1, counts());
            let error = background.wait_for(3, 1).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(background.newest_steps().is_err());
        }
    }
}
