use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use derive_new::new;

use crate::{
    RoutingCounts,
    background::BackgroundPlanner,
    callback::{CallbackError, PlannerHost, RoutingObserver, StepContext, TrainingCallback},
    planner::{LayerPlanner, Strategy},
};

/// Configuration of the [`PlannerCallback`]; equal on all ranks.
#[derive(new, Debug, Clone)]
pub struct PlannerConfig {
    /// How layouts are planned.
    pub strategy: Strategy,
    /// Wait for the planner at the end of each step, so that runs can be repeated bit for bit. Otherwise training never
    /// waits: where the planner is late, the layout stays.
    #[new(value = "false")]
    pub synchronous: bool,
    /// Seed of the planner's random choices.
    #[new(value = "0")]
    pub seed: u64,
}

impl PlannerConfig {
    /// Sets whether each step waits for the planner.
    pub fn with_synchronous(mut self, synchronous: bool) -> Self {
        self.synchronous = synchronous;
        self
    }

    /// Sets the seed of the planner's random choices.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The callback.
    pub fn init(&self) -> PlannerCallback {
        PlannerCallback { config: self.clone(), running: None, report: PlannerReport::default() }
    }
}

/// What the planner did so far.
#[derive(Debug, Clone, Default)]
pub struct PlannerReport(Arc<Mutex<ReportData>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct ReportData {
    adopted: u64,
    late: u64,
    solve_time: Duration,
}

impl PlannerReport {
    /// Layouts put into use, over all layers.
    pub fn adopted(&self) -> u64 {
        self.data().adopted
    }

    /// How often a layer kept its layout because some rank's planner had not finished.
    pub fn late(&self) -> u64 {
        self.data().late
    }

    /// How long the last step's layouts took, over all layers.
    pub fn solve_time(&self) -> Duration {
        self.data().solve_time
    }

    fn data(&self) -> ReportData {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Plans new layouts from each step's routing counts and puts them into use between steps.
///
/// Every rank plans for itself from equal counts. Before a layout is used, the ranks agree on the newest that all of
/// them have, so all switch to the same layout in the same step.
#[derive(Debug)]
pub struct PlannerCallback {
    config: PlannerConfig,
    running: Option<Running>,
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
    background: Arc<BackgroundPlanner>,
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
        self.background.submit(layer, step, counts.clone());
    }
}

impl PlannerCallback {
    /// A handle on what the planner did, for metrics; valid while and after training.
    pub fn report(&self) -> PlannerReport {
        self.report.clone()
    }

    fn start(&self, host: &dyn PlannerHost) -> Result<Running, CallbackError> {
        let strategy = self.config.strategy;
        let planners = (0..host.num_layers())
            .filter(|&layer| host.is_plannable(layer) && strategy != Strategy::Static)
            .map(|layer| {
                let initial = host.layout(layer).as_ref().clone();
                let solver = strategy.solver(self.config.seed.wrapping_add(layer as u64));
                (layer, LayerPlanner::new(host.topology(), initial, strategy.predictor(), solver))
            });
        let background = Arc::new(BackgroundPlanner::start(planners.collect())?);
        let forwarder = Arc::new(Forwarder { background: background.clone(), seen: Mutex::default() });
        host.set_observer(Some(forwarder.clone()));
        Ok(Running { background, forwarder, in_use: BTreeMap::new() })
    }
}

impl TrainingCallback for PlannerCallback {
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
        *self.report.0.lock().unwrap_or_else(PoisonError::into_inner) = data;
        Ok(())
    }

    fn on_train_end(&mut self, host: &dyn PlannerHost) -> Result<(), CallbackError> {
        host.set_observer(None);
        self.running = None;
        Ok(())
    }
}
