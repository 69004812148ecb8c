use std::{
    collections::{BTreeMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{LayerPlanner, Layout, PlannerError, RoutingCounts};

/// Plans layers on a thread of its own.
///
/// A layer's counts are handed over as soon as its forward pass knows them ([`submit`](Self::submit)), so planning hides
/// behind the rest of forward and backward. Layouts are numbered by the forward pass whose counts they come from, per layer
/// and from 1. At the end of each step the ranks take the smallest of their [`newest`](Self::newest) numbers and
/// [`agree`](Self::agree) on the layouts of that number, which all of them have.
///
/// What waits for the thread is bounded. A layer whose planner is, on any rank, more than a step behind takes no counts in the
/// next step: they are skipped, on all ranks alike, since all have agreed on how far the slowest is. So ranks that are given
/// the same counts in the same order, and the same agreements, plan the same, however fast each is.
#[derive(Debug)]
pub struct BackgroundPlanner {
    /// `None` once the planner is shutting down.
    requests: Option<mpsc::Sender<Request>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the ranks agreed on at the end of a step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgreedLayouts {
    /// Layouts to put into use, by layer; those of other layers stay.
    pub layouts: Vec<(usize, Arc<Layout>)>,
    /// Layers of which some rank's planner has not finished with all counts.
    pub late: u64,
    /// Counts that were skipped in the step, over all layers.
    pub skipped: u64,
}

#[derive(Debug)]
enum Request {
    Plan { layer: usize, pass: u64, counts: Arc<RoutingCounts> },
    Save(mpsc::Sender<Result<PlannerStates, PlannerError>>),
}

/// What planners have learned, by layer; see [`LayerPlanner::save`].
pub type PlannerStates = BTreeMap<usize, Vec<u8>>;

/// Planners' states, while their thread gets to write them. Dropped, they are not waited for.
#[derive(Debug)]
pub struct PendingStates {
    states: mpsc::Receiver<Result<PlannerStates, PlannerError>>,
    shared: Arc<Shared>,
}

impl PendingStates {
    /// Waits until they are written.
    ///
    /// # Errors
    ///
    /// As [`BackgroundPlanner::save`].
    pub fn wait(self) -> Result<PlannerStates, PlannerError> {
        if let Ok(states) = self.states.recv() {
            return states;
        }
        self.shared.lock().check()?;
        Err(PlannerError::Stopped("its thread ended".into()))
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    layers: BTreeMap<usize, LayerState>,
    error: Option<PlannerError>,
    stopped: bool,
}

/// Most passes of a layer that are planned from between two agreements: a loop that never agrees must not fill the memory.
const MAX_PASSES: usize = 64;

/// How far a layer is. Passes count from 1; 0 is none.
#[derive(Debug)]
struct LayerState {
    /// The last pass handed to the thread, now and when the ranks agreed last.
    submitted: u64,
    submitted_before: u64,
    /// Passes that are still taken before the next agreement.
    room: usize,
    /// Passes skipped since the last agreement.
    skipped: u64,
    /// The last pass that the thread has planned from.
    newest: u64,
    /// The pass that the layout in use comes from.
    in_use: u64,
    /// Layouts from that pass on.
    ready: VecDeque<(u64, Arc<Layout>)>,
    solve_time: Duration,
}

impl LayerState {
    fn new() -> Self {
        Self {
            submitted: 0,
            submitted_before: 0,
            room: MAX_PASSES,
            skipped: 0,
            newest: 0,
            in_use: 0,
            ready: VecDeque::new(),
            solve_time: Duration::ZERO,
        }
    }

    /// All ranks have planned from `agreed`. Returns its layout, unless that is in use.
    fn agree(&mut self, agreed: u64) -> Option<Arc<Layout>> {
        let is_a_step_behind_at_most = agreed >= self.submitted_before;
        self.room = if is_a_step_behind_at_most { MAX_PASSES } else { 0 };
        self.submitted_before = self.submitted;
        self.skipped = 0;
        if agreed <= self.in_use {
            return None;
        }
        self.in_use = agreed;
        self.ready.retain(|(pass, _)| *pass >= agreed);
        self.ready.pop_front_if(|(pass, _)| *pass == agreed).map(|(_, layout)| layout)
    }
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
        shared.lock().layers = planners.keys().map(|&layer| (layer, LayerState::new())).collect();
        let thread = std::thread::Builder::new()
            .name("fsep-planner".into())
            .spawn({
                let shared = shared.clone();
                move || serve(planners, &inbox, &shared)
            })
            .map_err(|error| PlannerError::Stopped(format!("its thread could not be started: {error}")))?;
        Ok(Self { requests: Some(requests), shared, thread: Some(thread) })
    }

    /// Hands over the counts of a layer's forward pass, or skips them; returns at once. Layers that are not planned are
    /// ignored.
    pub fn submit(&self, layer: usize, pass: u64, counts: Arc<RoutingCounts>) {
        let mut state = self.shared.lock();
        let Some(planned) = state.layers.get_mut(&layer) else { return };
        if planned.room == 0 {
            planned.skipped += 1;
            return;
        }
        planned.room -= 1;
        planned.submitted = pass;
        drop(state);
        if let Some(requests) = &self.requests {
            // Fails only if the thread is gone, which `newest` reports.
            let _ = requests.send(Request::Plan { layer, pass, counts });
        }
    }

    /// The newest pass that each planned layer has a layout from, in layer order; 0 is none.
    ///
    /// # Errors
    ///
    /// The error that stopped the planner, if one did.
    pub fn newest(&self) -> Result<Vec<u64>, PlannerError> {
        let state = self.shared.lock();
        state.check()?;
        Ok(state.layers.values().map(|layer| layer.newest).collect())
    }

    /// Waits until there are layouts from all counts that were handed over: for runs that must be reproducible.
    ///
    /// # Errors
    ///
    /// The error that stopped the planner, if one did.
    pub fn wait(&self) -> Result<(), PlannerError> {
        let mut state = self.shared.lock();
        loop {
            state.check()?;
            if state.layers.values().all(|layer| layer.newest >= layer.submitted) {
                return Ok(());
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends a step: `agreed` is the element-wise minimum of all ranks' [`newest`](Self::newest).
    pub fn agree(&self, agreed: &[u64]) -> AgreedLayouts {
        let mut result = AgreedLayouts::default();
        for ((&layer, state), &agreed) in self.shared.lock().layers.iter_mut().zip(agreed) {
            result.late += u64::from(agreed < state.submitted || state.skipped > 0);
            result.skipped += state.skipped;
            result.layouts.extend(state.agree(agreed).map(|layout| (layer, layout)));
        }
        result
    }

    /// What the planners have learned from all counts that were handed over; waits until they have.
    ///
    /// # Errors
    ///
    /// The error that stopped the planner, if one did; [`PlannerError::State`] if a state cannot be written.
    pub fn save(&self) -> Result<PlannerStates, PlannerError> {
        self.start_save().wait()
    }

    /// As [`save`](Self::save), of the counts that were handed over before; returns at once.
    pub fn start_save(&self) -> PendingStates {
        let (reply, states) = mpsc::channel();
        if let Some(requests) = &self.requests {
            // Fails only if the thread is gone, which `wait` reports.
            let _ = requests.send(Request::Save(reply));
        }
        PendingStates { states, shared: self.shared.clone() }
    }

    /// How long the planned layers' last solutions took, all together.
    pub fn solve_time(&self) -> Duration {
        self.shared.lock().layers.values().map(|layer| layer.solve_time).sum()
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
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
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
        let (layer, pass, counts) = match request {
            Request::Plan { layer, pass, counts } => (layer, pass, counts),
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
        let mut state = shared.lock();
        match planned {
            Ok(Ok(layout)) => {
                if let Some(layer) = state.layers.get_mut(&layer) {
                    layer.ready.push_back((pass, Arc::new(layout)));
                    layer.newest = pass;
                    layer.solve_time = solve_time;
                }
            }
            Ok(Err(error)) => state.error = Some(error),
            Err(_) => state.error = Some(PlannerError::Stopped("the layout solver panicked".into())),
        }
        let failed = state.error.is_some();
        drop(state);
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
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        PlannerStrategy, Topology,
        placement::{LayoutRequest, LayoutSolver},
        predictor::LastStep,
    };

    fn planner(solver: Box<dyn LayoutSolver>) -> BackgroundPlanner {
        let initial = Layout::static_ep(2, 2, 3).unwrap();
        let topology = Topology::single_node(2).unwrap();
        let layer = LayerPlanner::new(topology, initial, Box::new(LastStep::new()), solver);
        BackgroundPlanner::start(BTreeMap::from([(3, layer)])).unwrap()
    }

    /// Counts that want the expert `pass % 3` twice.
    fn counts(pass: u64) -> Arc<RoutingCounts> {
        let row = (0..3).map(|expert| if expert == pass % 3 { 9 } else { 2 }).collect::<Vec<_>>();
        Arc::new(RoutingCounts::from_rows(&[row.clone(), row]).unwrap())
    }

    #[test]
    fn layouts_are_kept_until_a_later_one_is_agreed_on() {
        let background = planner(PlannerStrategy::Paper.solver(0));
        assert_eq!(background.newest().unwrap(), [0]);
        for pass in 1..=3 {
            background.submit(3, pass, counts(pass));
        }
        background.submit(4, 1, counts(1));
        background.wait().unwrap();
        assert_eq!(background.newest().unwrap(), [3]);
        let agreed = background.agree(&[2]);
        assert_eq!((agreed.layouts.len(), agreed.layouts[0].0, agreed.late, agreed.skipped), (1, 3, 1, 0));
        assert_eq!(background.agree(&[1]).layouts, []);
        assert_eq!(background.agree(&[2]).layouts, []);
        let agreed = background.agree(&[3]);
        assert_eq!((agreed.layouts.len(), agreed.late), (1, 0));
        assert!(background.solve_time() > Duration::ZERO);
    }

    /// Gives the hottest expert the slot that is free, and waits for leave to do so each time.
    #[derive(Debug)]
    struct Waiting {
        leave: mpsc::Receiver<()>,
        seen: Arc<Mutex<Vec<RoutingCounts>>>,
    }

    impl LayoutSolver for Waiting {
        fn name(&self) -> &'static str {
            "waiting"
        }

        fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
            // An error where the test is over.
            let _ = self.leave.recv();
            self.seen.lock().unwrap().push(request.predicted.clone());
            let totals = request.predicted.expert_totals();
            let hot = (0..3).max_by_key(|&expert| totals[expert]).unwrap() as u32;
            Layout::from_rows(3, &[vec![hot, (hot + 1) % 3], vec![hot, (hot + 2) % 3]])
        }
    }

    /// A rank's planner, what gives it leave, and the counts that it has planned from.
    type Rank = (BackgroundPlanner, mpsc::Sender<()>, Arc<Mutex<Vec<RoutingCounts>>>);

    fn two_ranks() -> [Rank; 2] {
        [(); 2].map(|()| {
            let (leave, receiver) = mpsc::channel();
            let seen = Arc::new(Mutex::new(Vec::new()));
            (planner(Box::new(Waiting { leave: receiver, seen: seen.clone() })), leave, seen)
        })
    }

    /// The end of a step on both ranks.
    fn agree(ranks: [&BackgroundPlanner; 2]) -> AgreedLayouts {
        let [a, b] = ranks.map(|rank| rank.newest().unwrap()[0]);
        let [a, b] = ranks.map(|rank| rank.agree(&[a.min(b)]));
        assert_eq!(a, b);
        a
    }

    /// As long as the solver of one rank is stuck, at most two steps' counts are taken, on both ranks the same.
    #[test]
    fn what_waits_for_a_slow_rank_is_bounded_and_skipped_alike() {
        let [(fast, fast_leave, fast_seen), (slow, slow_leave, slow_seen)] = two_ranks();
        (0..1000).for_each(|_| fast_leave.send(()).unwrap());
        // The layer runs twice a step.
        let submit = |step: u64| {
            for pass in [2 * step - 1, 2 * step] {
                [&fast, &slow].iter().for_each(|rank| rank.submit(3, pass, counts(pass)));
            }
            fast.wait().unwrap();
        };
        let mut skipped = 0;
        for step in 1..=40 {
            submit(step);
            let agreed = agree([&fast, &slow]);
            assert_eq!((agreed.layouts.len(), agreed.late), (0, 1), "step {step}");
            skipped += agreed.skipped;
        }
        assert_eq!((fast_seen.lock().unwrap().len(), slow_seen.lock().unwrap().len()), (4, 0));
        assert_eq!(skipped, 2 * 40 - 4);

        // It catches up, and nothing is skipped as long as it is not a whole step behind.
        (0..1000).for_each(|_| slow_leave.send(()).unwrap());
        slow.wait().unwrap();
        assert_eq!(agree([&fast, &slow]).layouts.len(), 1);
        for step in 41..=60 {
            submit(step);
            if step % 2 == 0 {
                slow.wait().unwrap();
                assert_eq!(agree([&fast, &slow]).layouts.len(), 1);
            } else {
                agree([&fast, &slow]);
            }
        }
        assert_eq!(agree([&fast, &slow]).skipped, 0);
        assert_eq!(*fast_seen.lock().unwrap(), *slow_seen.lock().unwrap());
        assert_eq!(fast_seen.lock().unwrap().len(), 4 + 2 * 20);
    }

    /// Ranks whose planners are now fast and now slow, each by itself, adopt the same layouts in the same steps.
    #[test]
    fn ranks_of_any_speed_adopt_the_same_layouts() {
        let [(a, leave_a, seen_a), (b, leave_b, seen_b)] = two_ranks();
        let mut random = crate::SplitMix64::new(5);
        let (mut adopted, mut skipped) = (BTreeSet::new(), 0);
        for pass in 1..=300 {
            for rank in [&a, &b] {
                rank.submit(3, pass, counts(pass / 7));
            }
            for leave in [&leave_a, &leave_b] {
                // The fifth part of the time it may do much, else nothing.
                (0..if random.below(5) == 0 { 4 } else { 0 }).for_each(|_| leave.send(()).unwrap());
            }
            std::thread::yield_now();
            let agreed = agree([&a, &b]);
            skipped += agreed.skipped;
            adopted.extend(agreed.layouts.iter().map(|(_, layout)| layout.as_slice().to_vec()));
        }
        for leave in [&leave_a, &leave_b] {
            (0..1000).for_each(|_| leave.send(()).unwrap());
        }
        [&a, &b].iter().for_each(|rank| rank.wait().unwrap());
        adopted.extend(agree([&a, &b]).layouts.iter().map(|(_, layout)| layout.as_slice().to_vec()));
        assert_eq!(*seen_a.lock().unwrap(), *seen_b.lock().unwrap());
        assert_eq!(seen_a.lock().unwrap().len() as u64 + skipped, 300);
        assert!(!adopted.is_empty());
    }

    /// A loop that forgets to agree plans from no more than so many passes.
    #[test]
    fn without_agreement_few_passes_are_planned_from() {
        let background = planner(PlannerStrategy::Paper.solver(0));
        (1..=1000).for_each(|pass| background.submit(3, pass, counts(pass)));
        background.wait().unwrap();
        assert_eq!(background.newest().unwrap(), [MAX_PASSES as u64]);
        let agreed = background.agree(&[MAX_PASSES as u64]);
        assert_eq!((agreed.layouts.len(), agreed.skipped), (1, 1000 - MAX_PASSES as u64));
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
            background.submit(3, 1, counts(1));
            let error = background.wait().unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(background.newest().is_err());
        }
    }
}
