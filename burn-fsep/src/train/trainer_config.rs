use derive_new::new;

use super::{Accumulation, GradientBuckets, PlannerConfig};
use crate::checkpoint::{CheckpointConfig, TrainingProgress};

/// Configuration of a [`Trainer`](super::Trainer); equal on all ranks.
#[derive(new, Debug, Clone)]
pub struct TrainerConfig {
    /// Largest global norm of the gradients of a step; `None` clips nothing.
    #[new(default)]
    pub max_grad_norm: Option<f64>,
    /// Whether gradients have to be finite where nothing is clipped.
    #[new(value = "true")]
    pub check_gradients: bool,
    /// Batches whose gradients make an optimizer step.
    #[new(value = "1")]
    pub accumulation_steps: usize,
    /// How they make it.
    #[new(default)]
    pub accumulation: Accumulation,
    /// Optimizer steps between two checks that replicated parameters are equal on all ranks, which are also made before the
    /// first two steps; `None` checks nothing.
    #[new(value = "Some(100)")]
    pub check_replicas_every: Option<u64>,
    /// Whether every layer is connected to the loss; see [`FsepRuntime::connect`](crate::FsepRuntime::connect).
    #[new(value = "true")]
    pub connect: bool,
    /// The buckets that the model prepares its blocks for.
    #[new(default)]
    pub buckets: Option<GradientBuckets>,
    /// What plans the layouts.
    #[new(default)]
    pub planner: Option<PlannerConfig>,
    /// Where checkpoints go.
    #[new(default)]
    pub checkpoints: Option<CheckpointConfig>,
    /// Where training begins.
    #[new(value = "TrainingProgress::new(0)")]
    pub start: TrainingProgress,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl TrainerConfig {
    /// Clips gradients by their global norm; see [`clip_grad_norm`](super::clip_grad_norm). A norm that is not finite is
    /// [`FsepError::GradientNorm`](crate::FsepError::GradientNorm) on all ranks, before the optimizer sees the gradients.
    pub fn with_max_grad_norm(mut self, max_norm: f64) -> Self {
        self.max_grad_norm = Some(max_norm);
        self
    }

    /// Sets whether gradients that are not finite are the same error where nothing is clipped (by default): else the optimizer would
    /// make every parameter NaN, and checkpoints would keep that. It costs their norm, which the host waits for once a step.
    /// Clipping checks in any case.
    pub fn with_check_gradients(mut self, check: bool) -> Self {
        self.check_gradients = check;
        self
    }

    /// Lets the gradients of so many batches (1 by default) make an optimizer step.
    pub fn with_accumulation_steps(mut self, steps: usize) -> Self {
        self.accumulation_steps = steps;
        self
    }

    /// Sets whether they make it by their mean (by default) or their sum. Clipping comes after that.
    pub fn with_accumulation(mut self, accumulation: Accumulation) -> Self {
        self.accumulation = accumulation;
        self
    }

    /// Sets how many optimizer steps lie between two checks that replicated parameters are equal on all ranks (100 by
    /// default); see [`check_replicas`](super::check_replicas).
    pub fn with_check_replicas_every(mut self, steps: Option<u64>) -> Self {
        self.check_replicas_every = steps;
        self
    }

    /// Sets whether every layer is connected to the loss (by default); see [`FsepRuntime::connect`](crate::FsepRuntime::connect). Models in which every rank
    /// always uses every layer can spare themselves that.
    pub fn with_connect(mut self, connect: bool) -> Self {
        self.connect = connect;
        self
    }

    /// Averages dense gradients in these buckets, for which the model prepares its blocks; see [`GradientBuckets`].
    pub fn with_gradient_buckets(mut self, buckets: GradientBuckets) -> Self {
        self.buckets = Some(buckets);
        self
    }

    /// Plans layouts from the routing of past batches.
    pub fn with_planner(mut self, planner: PlannerConfig) -> Self {
        self.planner = Some(planner);
        self
    }

    /// Saves checkpoints of model, optimizer, planner and progress, after every so many optimizer steps if the configuration
    /// says so, and where [`Trainer::save`](super::Trainer::save) is called.
    pub fn with_checkpoints(mut self, config: CheckpointConfig) -> Self {
        self.checkpoints = Some(config);
        self
    }

    /// Goes on from the progress of a checkpoint, with its model and optimizer:
    ///
    /// ```no_run
    /// # use burn::{nn::Linear, optim::ModuleOptimizer};
    /// # use burn_fsep::{FsepError, FsepRuntime, checkpoint, train::{Trainer, TrainerConfig}};
    /// # fn resume(runtime: &FsepRuntime, model: Linear, optimizer: ModuleOptimizer) -> Result<Trainer<Linear>, FsepError> {
    /// let loaded = checkpoint::load("checkpoints/000003-step-300", runtime, &model, &optimizer)?;
    /// TrainerConfig::new().with_start(loaded.progress).init(runtime, loaded.model, loaded.optimizer)
    /// # }
    /// ```
    pub fn with_start(mut self, progress: TrainingProgress) -> Self {
        self.start = progress;
        self
    }
}
