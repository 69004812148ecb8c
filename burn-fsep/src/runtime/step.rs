//! What a training loop tells the runtime of its steps.

use std::{collections::HashMap, sync::Weak};

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::Tensor,
};
use burn_fsep_planner::BackgroundPlanner;

use super::FsepRuntime;
use crate::FsepError;

impl FsepRuntime {
    /// Tells the schedule which parameters the coming forward pass will use, so that each layer's experts can be unsharded
    /// behind the compute of the layer before; the first layer's unshard starts now. Collective, once before each training
    /// forward pass; [`Trainer`](crate::train::Trainer) and `FsepStrategy` call it for you.
    ///
    /// Without it, layers unshard their experts when they come to them, and the result is the same. The order of layers is
    /// learned from the step before. A step that runs layers in another order, or with other parameters than `model` has now,
    /// unshards these when it comes to them; [`FsepRuntime::missed_prefetches`] counts such cases.
    ///
    /// # Errors
    ///
    /// [`FsepError::Comm`] if the unshard cannot be started.
    pub fn begin_step<M: Module>(&self, model: &M) -> Result<(), FsepError> {
        self.begin_batch(model, false)
    }

    /// [`begin_step`](Self::begin_step) before a batch whose gradients are accumulated with those of batches to come: until these have
    /// come the parameters stay, and so do the experts of the layers that keep theirs from forward to backward
    /// ([`ScheduleConfig::kept_layers`](crate::ScheduleConfig)), which are restored once for all of them, beside the two that are alive
    /// at any time. The last of these batches begins with `begin_step`.
    ///
    /// # Errors
    ///
    /// As [`begin_step`](Self::begin_step).
    pub fn begin_micro_batch<M: Module>(&self, model: &M) -> Result<(), FsepError> {
        self.begin_batch(model, true)
    }

    /// Frees the experts that [`begin_micro_batch`](Self::begin_micro_batch) has kept, for a step that ends before it was to.
    pub fn end_micro_batches(&self) {
        self.inner.schedule.forget_left();
    }

    fn begin_batch<M: Module>(&self, model: &M, is_followed: bool) -> Result<(), FsepError> {
        self.inner.observed.begin();
        let schedule = &self.inner.schedule;
        schedule.set_followed(is_followed);
        if !schedule.config().prefetch_forward || self.groups().experts().size() == 1 {
            return Ok(());
        }
        let mut shards = Shards { layer_of: schedule.registered(), by_layer: HashMap::new() };
        model.visit(&mut shards);
        if let Some((layer, weights)) = schedule.begin_step(shards.by_layer) {
            let unshard = self.unshard_ahead(layer, weights);
            unshard.start().inspect_err(|error| {
                schedule.reset();
                self.inner.tell_peers(&error.to_string());
            })?;
            schedule.set_ahead(layer, unshard);
        }
        Ok(())
    }

    /// Ends a step: until the next [`begin_step`](Self::begin_step), forward passes that track gradients (a look at a loss, a
    /// gradient check) are no part of what the planner learns. On all ranks, after backward;
    /// [`PlannerCallback::step`](crate::train::PlannerCallback::step) calls it. Without effect in a program that never calls
    /// `begin_step`, all of whose training forward passes are observed.
    pub fn end_step(&self) {
        self.inner.observed.end();
    }

    /// Experts that were prefetched for nothing: the step ran other layers, or with other parameters, than was expected.
    pub fn missed_prefetches(&self) -> u64 {
        self.inner.schedule.missed()
    }

    /// Sets the planner that is given the counts of each training forward pass, for as long as it lives.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if there is one.
    pub(crate) fn set_planner(&self, planner: Weak<BackgroundPlanner>) -> Result<(), FsepError> {
        if self.inner.observed.set_planner(planner) {
            return Ok(());
        }
        Err(FsepError::Config(
            "this runtime has a planner that plans all of its layers: let one trainer or loop have it, and drop it before the next"
                .into(),
        ))
    }
}

/// The shards among a model's parameters. Nothing else is looked at: parameters may be lazy.
struct Shards {
    layer_of: HashMap<ParamId, usize>,
    by_layer: HashMap<usize, Tensor<2>>,
}

impl ModuleVisitor for Shards {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(&layer) = self.layer_of.get(&param.id)
            && let [rows, columns] = param.shape()[..]
        {
            self.by_layer.insert(layer, param.val().inner().reshape([rows, columns]));
        }
    }
}
