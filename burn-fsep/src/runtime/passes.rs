//! The passes of layers, from routing to the end of backward.

use std::{
    fmt,
    sync::{Arc, Weak},
};

use burn::{
    module::ParamId,
    tensor::{FloatDType, Tensor},
};

use parking_lot::Mutex;

use super::{
    ChunkStart, FsepRuntime, expert_loads::ExpertLoads, fsep_runtime::Inner, layer_state::Routing, outputs::Outputs,
};
use crate::{
    FsepError,
    comm::Operation,
    ops::{
        self, BesideTokens, Deferred, LayerPass, LayerSpec, PassHost, RoutedDispatch, Tracked, Unshard, UnshardRequest,
        Unshards,
    },
    schedule::ForwardStart,
    shard::UnshardPlan,
};

/// What a layer's pass begins with.
pub(crate) struct PassStart {
    /// The tokens, chunk by chunk: as many chunks as [`FsepRuntime::token_chunks`] says.
    pub chunks: Vec<ChunkStart>,
    /// Which gradients are wanted.
    pub tracked: Tracked,
    /// This rank's part of the experts, and its id.
    pub weights: Tensor<2>,
    pub param: ParamId,
    /// What to do while tokens travel in forward.
    pub beside: Option<BesideTokens>,
}

impl FsepRuntime {
    /// Exchanges the routing counts of a layer, plans its dispatch, and makes everything ready for its forward pass.
    /// Collective.
    pub(crate) fn begin_pass(
        &self,
        spec: &Arc<LayerSpec>,
        start: PassStart,
    ) -> Result<(Arc<LayerPass>, ExpertLoads), FsepError> {
        let PassStart { chunks, tracked, weights, param, beside } = start;
        let (layer, is_sharded, schedule) = (spec.layer, spec.is_sharded(), &self.inner.schedule);
        if is_sharded {
            // Ids may be new after a record was loaded.
            schedule.register(param, layer);
        }
        let param_dtype = weights.dtype();
        let shards = weights.inner();
        let begun = if is_sharded && tracked.any() {
            schedule.begin_forward(layer, |ahead| ops::is_same(&ahead.weights, &shards))
        } else {
            ForwardStart::default()
        };
        let ahead = begun.ahead.as_ref().map(|ahead| ahead.layout.fingerprint());
        let element = spec.input_dtype(param_dtype).size();
        let dispatch = self.route(layer, Routing { chunks, element, tracked, ahead })?;
        let operation = spec.operation("loads of the experts");
        let loads = ExpertLoads::start(self.shards_comm(), operation, tracked, &dispatch.counts)?;
        let unshards = is_sharded.then(|| self.unshards(spec, &dispatch, shards, tracked, begun));
        let (inner, outputs) = (self.inner.clone(), Arc::downgrade(&self.outputs));
        let pass = Arc::new(LayerPass {
            spec: spec.clone(),
            context: inner.context.clone(),
            host: Box::new(RuntimeHost { inner, outputs }),
            dispatch,
            unshards,
            tracked,
            param_dtype,
            beside_tokens: Mutex::new(beside),
        });
        if is_sharded && tracked.any() {
            schedule.await_backward(&pass);
        }
        Ok((pass, loads))
    }

    /// In how many chunks tokens go through a layer; equal on all ranks.
    pub(crate) fn token_chunks(&self) -> usize {
        // A single rank sends nothing that compute could hide.
        if self.groups().experts().size() == 1 { 1 } else { self.inner.token_chunks }
    }

    fn route(&self, layer: usize, routing: Routing) -> Result<RoutedDispatch, FsepError> {
        let tracked = routing.tracked;
        let _span = self.timeline().and_then(|timeline| timeline.wait(format!("routing counts, layer {layer}")));
        let dispatch = self.layer(layer).route(&self.inner.groups, &self.inner.topology, routing)?;
        if tracked.any()
            && self.inner.observed.is_observing()
            && let Some(planner) = self.inner.observed.planner()
        {
            planner.submit(layer, dispatch.pass, dispatch.counts.clone());
        }
        Ok(dispatch)
    }

    /// The unshards of a layer's pass, and what it starts for the layer after.
    fn unshards(
        &self,
        spec: &LayerSpec,
        dispatch: &RoutedDispatch,
        shards: Tensor<2>,
        tracked: Tracked,
        begun: ForwardStart,
    ) -> Unshards {
        let unshard = |name| {
            let operation = spec.operation(name).in_pass(dispatch.pass);
            let (plan, layout) = (dispatch.unshard.clone(), dispatch.layout.clone());
            ops::plan_unshard(self.request(operation, plan, spec.compute_dtype), layout, shards.clone())
        };
        let next = begun.next.map(|(layer, shards)| {
            let unshard = self.unshard_ahead(layer, shards);
            self.inner.schedule.set_ahead(layer, unshard.clone());
            unshard
        });
        let left = (begun.leave && tracked.needs_experts_in_backward()).then(|| {
            let left = unshard("unshard for the next batch");
            self.inner.schedule.leave(spec.layer, left.clone());
            left
        });
        Unshards {
            forward: begun.ahead.unwrap_or_else(|| unshard("unshard for forward")),
            backward: unshard("unshard for backward"),
            next,
            keep: begun.keep && tracked.needs_experts_in_backward(),
            left,
        }
    }

    /// The unshard of a layer's experts for its next forward pass, before its tokens are known.
    pub(super) fn unshard_ahead(&self, layer: usize, shards: Tensor<2>) -> Arc<Unshard> {
        let layer = self.layer(layer);
        let (layout, plan) = layer.unshard_plan();
        let operation = layer.spec().operation("unshard ahead").under_layout(layout.fingerprint());
        ops::plan_unshard(self.request(operation, plan, layer.spec().compute_dtype), layout, shards)
    }

    fn request(&self, operation: Operation, plan: Arc<UnshardPlan>, dtype: Option<FloatDType>) -> UnshardRequest {
        UnshardRequest { operation, plan, dtype, context: self.inner.context.clone() }
    }

    /// The forward pass of a layer has run: remembers its output for [`FsepRuntime::connect`]. Returns the assignments of each expert
    /// on all ranks, `[E]`.
    pub(crate) fn end_forward(
        &self,
        pass: &LayerPass,
        output: &Tensor<2>,
        loads: ExpertLoads,
    ) -> Result<Vec<u64>, FsepError> {
        let loads = loads.wait(pass.spec.layer)?;
        if pass.tracked.any() {
            self.outputs.remember(pass.spec.layer, pass.dispatch.pass, output);
            if self.inner.observed.is_observing() {
                self.layer(pass.spec.layer).add_expert_loads(&loads);
            }
        }
        Ok(loads)
    }

    /// Connects every FSEP layer of this step to the loss, without changing the loss.
    ///
    /// Backward reaches only what the loss depends on. If a rank's loss happens not to depend on some layer's output
    /// (a branch not taken, a head not used), that rank would skip the layer's backward collectives, for which the
    /// others wait. A connected layer takes part with zero gradients. Models in which every rank always uses every
    /// layer do not need it. Of a layer that runs more than once in a step, the last run is connected; one whose backward
    /// pass has run already is left alone.
    pub fn connect(&self, loss: Tensor<1>) -> Tensor<1> {
        self.outputs.connect(loss)
    }
}

/// The runtime as passes see it; it is held by the autodiff graph, so it does not hold the outputs.
struct RuntimeHost {
    inner: Arc<Inner>,
    outputs: Weak<Outputs>,
}

impl fmt::Debug for RuntimeHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RuntimeHost")
    }
}

impl PassHost for RuntimeHost {
    fn begin_backward(&self, pass: &LayerPass) -> Option<Arc<Unshard>> {
        self.inner.schedule.begin_backward(pass)
    }

    fn defer(&self, work: Deferred) -> Result<(), FsepError> {
        self.inner.schedule.defer(work)
    }

    fn catch_up(&self) -> Result<(), FsepError> {
        self.inner.schedule.catch_up()
    }

    fn await_mean(&self, wait: Deferred) {
        self.inner.schedule.await_mean(wait);
    }

    fn finish_means(&self) -> Result<(), FsepError> {
        self.inner.schedule.finish_means()
    }

    /// Forgets the output: it cannot be connected to another loss.
    fn end_backward(&self, pass: &LayerPass) {
        if let Some(outputs) = self.outputs.upgrade() {
            outputs.forget(pass.spec.layer, pass.dispatch.pass);
        }
    }

    fn fail(&self, error: FsepError) -> ! {
        self.inner.fail(error)
    }
}
