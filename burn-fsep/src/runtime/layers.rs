//! The layers of a runtime and their layouts.

use std::sync::Arc;

use burn_fsep_planner::Layout;

use super::{FsepRuntime, StepStats, layer_state::LayerState};
use crate::{FsepError, ops::LayerSpec};

impl FsepRuntime {
    /// Number of FSEP layers initialised with this runtime.
    pub fn num_layers(&self) -> usize {
        self.inner.layers.read().len()
    }

    /// The layout that a layer uses now.
    ///
    /// # Panics
    ///
    /// If there is no such layer.
    pub fn layout(&self, layer: usize) -> Arc<Layout> {
        self.layer(layer).layout()
    }

    /// Sets the layout that a layer uses from its next forward pass on. All ranks must set the same layout between
    /// the same two steps; the layer's next forward pass checks that they did.
    ///
    /// # Errors
    ///
    /// [`FsepError::Planner`] if the layout is not of the layer's sizes, [`FsepError::Config`] if the layer's experts
    /// have fixed owners (static expert parallelism) or there is no such layer.
    pub fn set_layout(&self, layer: usize, layout: Arc<Layout>) -> Result<(), FsepError> {
        let layers = self.inner.layers.read();
        let state = layers
            .get(layer)
            .ok_or_else(|| FsepError::Config(format!("there is no layer {layer}: the runtime has {}", layers.len())))?;
        state.set_layout(layout)
    }

    /// A layer goes on with the layout of a checkpoint: nothing has moved since the step before.
    pub(crate) fn resume_layout(&self, layer: usize, layout: Arc<Layout>) -> Result<(), FsepError> {
        self.set_layout(layer, layout)?;
        self.layer(layer).forget_moved_slots();
        Ok(())
    }

    /// What the layers' last training forward passes looked like.
    pub fn stats(&self) -> StepStats {
        StepStats { layers: self.inner.layers.read().iter().filter_map(|layer| layer.stats()).collect() }
    }

    /// Assignments of each expert of a layer on all ranks, of the training passes of steps since the last call; zeros if there is
    /// no such layer. Shape `[E]`.
    pub(crate) fn take_expert_loads(&self, layer: usize) -> Vec<u64> {
        let layers = self.inner.layers.read();
        layers.get(layer).map(|layer| layer.take_expert_loads()).unwrap_or_default()
    }

    /// Forgets the training passes since an optimizer step: none comes of them.
    pub(crate) fn forget_expert_loads(&self) {
        self.inner.layers.read().iter().for_each(|layer| drop(layer.take_expert_loads()));
    }

    /// Adds the layer that `spec` describes, given its number.
    pub(crate) fn register_layer(&self, spec: impl FnOnce(usize) -> LayerSpec) -> Result<Arc<LayerSpec>, FsepError> {
        let mut layers = self.inner.layers.write();
        let spec = Arc::new(spec(layers.len()));
        let inner = &self.inner;
        let plug_ins = (&inner.dispatcher, inner.repair.clone(), inner.token_rows);
        layers.push(Arc::new(LayerState::new(spec.clone(), &inner.topology, plug_ins)?));
        Ok(spec)
    }

    /// The facts of a layer, if there is one of this number.
    pub(crate) fn layer_spec(&self, layer: usize) -> Option<LayerSpec> {
        self.inner.layers.read().get(layer).map(|layer| layer.spec().clone())
    }

    pub(crate) fn has_fixed_layout(&self, layer: usize) -> bool {
        self.layer(layer).spec().fixed_layout
    }

    pub(super) fn layer(&self, layer: usize) -> Arc<LayerState> {
        let layers = self.inner.layers.read();
        let count = layers.len();
        layers.get(layer).unwrap_or_else(|| panic!("there is no layer {layer}: the runtime has {count}")).clone()
    }
}
