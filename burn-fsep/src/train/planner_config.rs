use std::{fmt, sync::Arc};

use burn_fsep_planner::{
    LayerPlanner, Layout, PlannerStrategy, Topology, placement::LayoutSolver, predictor::Predictor,
};
use derive_new::new;

use super::PlannerCallback;

/// Configuration of the [`PlannerCallback`]; equal on all ranks.
///
/// Dispatch and repairs in the step are the runtime's, see
/// [`FsepRuntimeConfig::with_strategy`](crate::FsepRuntimeConfig::with_strategy).
///
/// A [`PlannerStrategy`] names a predictor and a layout solver that suit each other. Either can be replaced by one with other
/// settings or by one of your own; for example LAER-MoE's solver with the constants of your cluster in its cost model:
///
/// ```
/// use burn_fsep::{
///     planner::{
///         PlannerStrategy,
///         cost::{CommunicationModel, CostConstants, CostModel},
///         placement::PaperSolver,
///         predictor::MovingAverage,
///     },
///     train::PlannerConfig,
/// };
///
/// let constants = CostConstants {
///     seconds_per_assignment: 0.6e-6, // a token through one expert, forward
///     bytes_per_token: 4096.0 * 2.0,  // D = 4096 in bf16
///     intra_node_bytes_per_second: 350e9,
///     inter_node_bytes_per_second: 45e9,
/// };
/// let cost = CostModel::new(constants, CommunicationModel::PortMax)?;
/// let average = MovingAverage::new(0.2)?;
/// let planner = PlannerConfig::new(PlannerStrategy::Paper)
///     .with_solver(move |layer| Box::new(PaperSolver::new(cost, layer as u64)))
///     .with_predictor(move |_| Box::new(average.clone()))
///     .init();
/// # Ok::<(), burn_fsep::planner::PlannerError>(())
/// ```
#[derive(new, Debug, Clone)]
pub struct PlannerConfig {
    /// How layouts are planned, as far as no solver or predictor is given.
    pub strategy: PlannerStrategy,
    /// Wait for the planner at the end of each step, so that runs can be repeated bit for bit. Otherwise training never
    /// waits: where the planner is late, the layout stays.
    #[new(value = "false")]
    pub synchronous: bool,
    /// Seed of the random choices of the strategy's solver.
    #[new(value = "0")]
    pub seed: u64,
    #[new(default)]
    solver: Option<Factory<dyn LayoutSolver>>,
    #[new(default)]
    predictor: Option<Factory<dyn Predictor>>,
}

/// Makes a layer's solver or predictor from the layer's number.
struct Factory<T: ?Sized>(Arc<dyn Fn(usize) -> Box<T> + Send + Sync>);

impl<T: ?Sized> Clone for Factory<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: ?Sized> fmt::Debug for Factory<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("given")
    }
}

impl PlannerConfig {
    /// Sets whether each step waits for the planner.
    pub fn with_synchronous(mut self, synchronous: bool) -> Self {
        self.synchronous = synchronous;
        self
    }

    /// Sets the seed of the random choices of the strategy's solver (0 by default).
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the layout solver, in place of the strategy's. `solver` makes one for each layer, from the layer's number.
    ///
    /// Every rank plans for itself, so a solver has to be deterministic; if it draws random numbers, from a seed that is
    /// equal on all ranks. What it has learned is kept in checkpoints if it implements [`LayoutSolver::save`] and
    /// [`LayoutSolver::load`]; a checkpoint is taken for one of the same solver if [`LayoutSolver::name`] is the same.
    pub fn with_solver(mut self, solver: impl Fn(usize) -> Box<dyn LayoutSolver> + Send + Sync + 'static) -> Self {
        self.solver = Some(Factory(Arc::new(solver)));
        self
    }

    /// Sets the predictor, in place of the strategy's. `predictor` makes one for each layer, from the layer's number.
    ///
    /// What holds for [solvers](Self::with_solver) holds for predictors.
    pub fn with_predictor(mut self, predictor: impl Fn(usize) -> Box<dyn Predictor> + Send + Sync + 'static) -> Self {
        self.predictor = Some(Factory(Arc::new(predictor)));
        self
    }

    /// The callback.
    pub fn init(&self) -> PlannerCallback {
        PlannerCallback::new(self.clone())
    }

    /// Whether layouts never change.
    pub(super) fn is_static(&self) -> bool {
        self.strategy == PlannerStrategy::Static && self.solver.is_none()
    }

    /// The planner of a layer that starts with `initial`.
    pub(super) fn layer_planner(&self, layer: usize, topology: Topology, initial: Layout) -> LayerPlanner {
        let solver = match &self.solver {
            Some(Factory(make)) => make(layer),
            None => self.strategy.solver(self.seed.wrapping_add(layer as u64)),
        };
        let predictor = match &self.predictor {
            Some(Factory(make)) => make(layer),
            None => self.strategy.predictor(),
        };
        LayerPlanner::new(topology, initial, predictor, solver)
    }
}
