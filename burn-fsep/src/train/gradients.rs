use std::sync::Arc;

use burn::{
    module::Module,
    optim::{GradientsAccumulator, GradientsParams},
};
use burn_fsep_planner::Layout;

use super::{
    Accumulation, TrainerConfig,
    clip::{grad_norm, scale},
    clip_grad_norm, replicas, sync_gradients,
};
use crate::{
    FsepError, FsepRuntime,
    checkpoint::HeldState,
    comm::{Operation, agree},
};

/// What has to happen between backward and the optimizer: accumulation, the check of replicas, averaging, clipping.
///
/// The one place where gradients become those of an optimizer step, for [`Trainer`](super::Trainer) and the Learner.
pub(crate) struct GradientStep<M> {
    runtime: FsepRuntime,
    config: TrainerConfig,
    accumulator: GradientsAccumulator<M>,
    /// Batches in the accumulator.
    accumulated: usize,
    /// The layouts before the first of them.
    layouts: Vec<Arc<Layout>>,
    /// Optimizer steps made here.
    done: u64,
}

impl<M: Module> GradientStep<M> {
    /// For an optimizer that holds so much of its state. Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if the configuration cannot work or is not equal on all ranks, [`FsepError::Comm`].
    pub fn new(runtime: &FsepRuntime, config: &TrainerConfig, held: HeldState) -> Result<Self, FsepError> {
        for (name, value) in [
            ("accumulation_steps", config.accumulation_steps as u64),
            ("check_replicas_every", config.check_replicas_every.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(FsepError::Config(format!("`{name}` must be at least 1")));
            }
        }
        if let Some(norm) = config.max_grad_norm.filter(|norm| norm.is_nan() || *norm <= 0.0) {
            return Err(FsepError::Config(format!("the maximum gradient norm must be positive, got {norm}")));
        }
        // Ranks with other options would train, but not as one: shards are only ever seen by their own rank.
        let options = [
            ("accumulation_steps", config.accumulation_steps as u64),
            ("accumulation", config.accumulation as u64),
            ("max_grad_norm", config.max_grad_norm.map_or(0, f64::to_bits)),
            ("check_gradients", u64::from(config.check_gradients)),
            ("check_replicas_every", config.check_replicas_every.unwrap_or(0)),
            ("connect", u64::from(config.connect)),
            ("buckets", config.buckets.as_ref().map_or(0, |buckets| buckets.bucket_bytes() as u64)),
            ("planner", u64::from(config.planner.is_some())),
            ("sharded optimizer or whole-matrix optimizer", held as u64),
        ];
        if let Some(difference) = agree(runtime.comm(), Operation::new("options of the training"), &options)? {
            return Err(FsepError::Config(format!(
                "the training's options have to be equal on all ranks, but {difference}"
            )));
        }
        let (runtime, config) = (runtime.clone(), config.clone());
        Ok(Self {
            runtime,
            config,
            accumulator: GradientsAccumulator::new(),
            accumulated: 0,
            layouts: Vec::new(),
            done: 0,
        })
    }

    /// Before the forward pass of a batch. Collective.
    pub fn begin(&mut self, model: &M) -> Result<(), FsepError> {
        if self.begins_window() {
            self.layouts = (0..self.runtime.num_layers()).map(|layer| self.runtime.layout(layer)).collect();
        }
        if let (true, Some(buckets)) = (self.accumulates(), &self.config.buckets) {
            buckets.pause();
        }
        match self.accumulated + 1 < self.config.accumulation_steps {
            true => self.runtime.begin_micro_batch(model),
            false => self.runtime.begin_step(model),
        }
    }

    /// Takes a batch's gradients, and returns those of its window if they are its last.
    pub fn add(&mut self, model: &M, grads: GradientsParams) -> Option<GradientsParams> {
        self.runtime.end_step();
        if !self.accumulates() {
            return Some(grads);
        }
        self.accumulator.accumulate(model, grads);
        self.accumulated += 1;
        if self.accumulated == self.config.accumulation_steps { self.end_window(model) } else { None }
    }

    /// The gradients of the batches since the last window; `None` if there was none.
    pub fn end_window(&mut self, model: &M) -> Option<GradientsParams> {
        let count = std::mem::take(&mut self.accumulated);
        self.runtime.end_micro_batches();
        let mut grads = (count > 0).then(|| self.accumulator.grads())?;
        if count > 1 && self.config.accumulation == Accumulation::Mean {
            scale(model, &mut grads, 1.0 / count as f64);
        }
        Some(grads)
    }

    /// Forgets the batches since the last window, and goes back to the layouts of then: a checkpoint of now has to be as if they
    /// had never been. Callbacks go back after that.
    pub fn discard_window(&mut self) -> Result<(), FsepError> {
        if std::mem::take(&mut self.accumulated) == 0 {
            return Ok(());
        }
        self.accumulator.grads();
        self.runtime.end_micro_batches();
        self.runtime.forget_expert_loads();
        for (layer, layout) in std::mem::take(&mut self.layouts).into_iter().enumerate() {
            if !self.runtime.has_fixed_layout(layer) {
                self.runtime.resume_layout(layer, layout)?;
            }
        }
        Ok(())
    }

    /// Whether the next batch is the first of several.
    pub fn begins_window(&self) -> bool {
        self.accumulates() && self.accumulated == 0
    }

    /// Whether a step takes more than one batch.
    fn accumulates(&self) -> bool {
        self.config.accumulation_steps > 1
    }

    /// Whether some batches wait for the rest of their window.
    pub fn is_in_window(&self) -> bool {
        self.accumulated > 0
    }

    /// Makes a window's gradients those of all ranks, for the training's optimizer step `step`, and returns their norm if they are
    /// clipped or checked. Collective.
    pub fn reduce(&mut self, model: &M, grads: &mut GradientsParams, step: u64) -> Result<Option<f64>, FsepError> {
        self.check_replicas(model)?;
        match &self.config.buckets {
            Some(buckets) => buckets.sync(model, grads)?,
            None => sync_gradients(&self.runtime, model, grads)?,
        }
        self.done += 1;
        let norm = match self.config.max_grad_norm {
            Some(max_norm) => clip_grad_norm(&self.runtime, model, grads, max_norm)?,
            None if self.config.check_gradients => grad_norm(&self.runtime, model, grads)?,
            None => return Ok(None),
        };
        if norm.is_finite() { Ok(Some(norm)) } else { Err(FsepError::GradientNorm { step, norm }) }
    }

    /// Before the first step, which finds initial values that differ; before the second, which finds a step that was not the same
    /// everywhere; and from time to time.
    fn check_replicas(&self, model: &M) -> Result<(), FsepError> {
        let Some(every) = self.config.check_replicas_every else { return Ok(()) };
        match self.done {
            0 => replicas::check(
                &self.runtime,
                model,
                "this is before the first optimizer step, so initial values differ: call `broadcast_parameters` on all ranks \
                 after initialisation, or load the same checkpoint",
            ),
            done if done == 1 || done.is_multiple_of(every) => replicas::check(
                &self.runtime,
                model,
                "it was equal when training began: a rank has changed it by itself, its gradients were not averaged \
                 (`sync_gradients`), or optimizers or learning rates differ",
            ),
            _ => Ok(()),
        }
    }
}
