use std::sync::Arc;

use burn::{
    module::Module,
    tensor::{DType, FloatDType, Tensor},
};

use super::{
    FsepExperts, TopKRouter,
    assignments::Assignments,
    losses::load_balancing_loss,
    tokens::{check_dtype, token_rows},
};
use crate::{
    FsepError, FsepRuntime,
    ops::{self, MoeStep, Tracked, WeightStorage},
    runtime::RestorePass,
    schedule::Entry,
    shard::{ExpertShape, foreign_owner},
};

/// A Mixture-of-Experts feed-forward layer whose experts are fully sharded over ranks.
///
/// Each token is computed by its `K` most probable SwiGLU experts; no token is dropped. For any world size, layout and
/// dispatch the result and all gradients are those of the same layer on one rank ([`DenseMoE`](super::DenseMoE)).
///
/// Collective: all ranks run the same layers in the same order, also with no token. Expert gradients come out of
/// backward complete and divided by `N` (the gradient of the mean over ranks of their losses); all other parameters
/// are replicated and need [`sync_gradients`](crate::train::sync_gradients), which
/// [`Trainer`](crate::train::Trainer) and `FsepStrategy` call for you.
///
/// Made by [`FSEPMoEConfig`](super::FSEPMoEConfig), on each rank with the rank's own runtime: a clone or `fork` of another
/// rank's layer has that rank's shards and speaks in its name.
///
/// Reference: LAER-MoE, arXiv 2602.11686, section 3.
#[derive(Module, Debug)]
pub struct FSEPMoE {
    /// Chooses the experts.
    pub router: TopKRouter,
    /// This rank's part of the experts.
    pub experts: FsepExperts,
    #[module(skip)]
    pub(super) settings: LayerSettings,
}

#[derive(Debug, Clone)]
pub(super) struct LayerSettings {
    pub runtime: FsepRuntime,
    pub layer: usize,
    pub shape: ExpertShape,
    pub storage: WeightStorage,
    pub recompute: bool,
    pub aux_loss_coeff: f64,
    pub compute_dtype: Option<FloatDType>,
}

/// Output of an MoE layer.
#[derive(Debug, Clone)]
pub struct MoeOutput<const D: usize> {
    /// As the input: `[.., D]`.
    pub hidden: Tensor<D>,
    /// Sum of the auxiliary losses that are switched on, in single precision, to be added to the loss. `[1]`
    pub aux_loss: Option<Tensor<1>>,
}

impl FSEPMoE {
    /// Applies the layer; auxiliary losses are dropped. `[.., D] -> [.., D]`
    ///
    /// # Panics
    ///
    /// If a collective fails or the input is of the wrong shape. Inside [`FsepRuntime::run`] the panic becomes a typed
    /// error; [`FSEPMoE::try_forward`] returns it.
    pub fn forward<const R: usize>(&self, hidden: Tensor<R>) -> Tensor<R> {
        self.forward_with_losses(hidden).hidden
    }

    /// Applies the layer. `[.., D] -> MoeOutput`
    ///
    /// # Panics
    ///
    /// As [`FSEPMoE::forward`].
    pub fn forward_with_losses<const R: usize>(&self, hidden: Tensor<R>) -> MoeOutput<R> {
        self.route_and_compute(hidden).unwrap_or_else(|error| self.settings.runtime.fail(error))
    }

    /// Applies the layer and returns what went wrong: short for [`FsepRuntime::run`] around
    /// [`FSEPMoE::forward_with_losses`]. It tries for all ranks, not for this one alone: after an error the group is spent.
    /// `[.., D] -> MoeOutput`
    ///
    /// # Errors
    ///
    /// [`FsepError::Shape`] for an input of the wrong shape; [`FsepError::Divergence`] if ranks do not agree on the
    /// layer; [`FsepError::Config`] if a rank's router has logits that are no numbers, or its experts are another rank's
    /// shards or reparameterized; [`FsepError::Comm`] if a collective fails; [`FsepError::Panicked`] if the backend panics.
    pub fn try_forward<const R: usize>(&self, hidden: Tensor<R>) -> Result<MoeOutput<R>, FsepError> {
        self.settings.runtime.run(|| self.forward_with_losses(hidden))
    }

    /// The index of this layer in its runtime.
    pub fn layer_index(&self) -> usize {
        self.settings.layer
    }

    /// The runtime of this layer's rank.
    pub fn runtime(&self) -> &FsepRuntime {
        &self.settings.runtime
    }

    fn route_and_compute<const R: usize>(&self, hidden: Tensor<R>) -> Result<MoeOutput<R>, FsepError> {
        let LayerSettings { runtime, layer, shape, storage, recompute, aux_loss_coeff, compute_dtype } = &self.settings;
        let (topk, num_experts) = (self.router.topk(), self.router.weight.dims()[1]);
        let dims = hidden.dims();
        // The router's weight may be another one for this pass: that of `GradientBuckets`.
        check_dtype(hidden.dtype(), compute_dtype.map_or(self.experts.weight.dtype(), DType::from))?;
        let tokens = token_rows(hidden)?;
        self.check_experts()?;

        let routed = self.router.forward(tokens.clone())?;
        let Assignments { ends, row_of, assignment_of, token_of } = Assignments::new(routed.experts, num_experts);
        let weights = self.experts.weight.val();
        let tracked =
            Tracked { hidden: tokens.is_tracked(), probs: routed.probs.is_tracked(), weights: weights.is_tracked() };
        let is_sharded = *storage == WeightStorage::Sharded;
        if is_sharded {
            // Ids may be new after a record was loaded.
            runtime.register_shards(*layer, self.experts.weight.id);
        }
        let shards = weights.clone().inner();
        let entry = if is_sharded && tracked.any() { runtime.enter(*layer, &shards) } else { Entry::default() };
        let ahead = entry.ahead.as_ref().map(|ahead| ahead.layout.fingerprint());
        let step = runtime.route(*layer, ends, tracked, ahead)?;
        let (counts, pass) = (step.counts.clone(), step.step_number);
        let restores = is_sharded.then(|| {
            let pass = RestorePass {
                weights: shards,
                layout: step.layout.clone(),
                unshard: step.unshard.clone(),
                number: pass,
                tracked,
                dtype: *compute_dtype,
            };
            runtime.restores(*layer, &pass, entry)
        });
        let (graph_runtime, outputs) = runtime.for_graph();
        let step = Arc::new(MoeStep {
            runtime: graph_runtime,
            outputs,
            layer: *layer,
            pass,
            shape: *shape,
            storage: *storage,
            layout: step.layout,
            unshard: step.unshard,
            restores,
            tracked,
            param_dtype: weights.dtype(),
            compute_dtype: *compute_dtype,
            tokens: step.tokens,
            slot_rows: step.slot_rows,
            topk,
            recompute: *recompute,
        });
        if tracked.any() && step.restores.is_some() {
            runtime.schedule().forwarded(&step);
        }
        let output = ops::moe(tokens, routed.probs, weights, row_of, assignment_of, token_of, step);
        if tracked.any() {
            runtime.remember_output(*layer, pass, &output);
        }
        let balancing = (*aux_loss_coeff > 0.0)
            .then(|| load_balancing_loss(routed.scores, &counts.expert_totals(), *aux_loss_coeff));
        let aux_loss = [balancing, routed.z_loss].into_iter().flatten().reduce(|a, b| a + b);
        Ok(MoeOutput { hidden: output.reshape(dims), aux_loss })
    }

    /// Whether the experts are what this rank was given of them: a user can load, or attach, anything else.
    fn check_experts(&self) -> Result<(), FsepError> {
        let LayerSettings { runtime, layer, storage, .. } = &self.settings;
        let (weight, rank) = (&self.experts.weight, runtime.rank());
        if *storage == WeightStorage::Sharded
            && let Some(other) = foreign_owner(weight.id, rank, runtime.world_size())
        {
            return Err(FsepError::Config(format!(
                "layer {layer} of rank {rank} has the shards of rank {other}: each rank has to save and load a record of its own \
                 (burn_fsep::checkpoint does, and loads with any number of ranks), and to make its own model"
            )));
        }
        if !ops::is_same(&weight.val().inner(), &weight.base().inner()) {
            return Err(FsepError::Config(format!(
                "the experts of layer {layer} are reparameterized (LoRA), but what a rank has of them are no matrices of the model: \
                 leave `experts.weight` out (`ParamGroup::exclude`)"
            )));
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::{
        FSEPMoEConfig, FsepRuntimeConfig,
        comm::local::{LaunchConfig, launch},
    };

    /// Compares on the scale of the largest value: single values may be differences of much larger ones.
    fn assert_close(actual: &TensorData, expected: &TensorData) {
        assert_eq!(actual.shape(), expected.shape());
        let largest = expected.iter::<f32>().fold(0.0, |largest: f32, value| largest.max(value.abs()));
        for (actual, expected) in actual.iter::<f32>().zip(expected.iter::<f32>()) {
            assert!(
                (actual - expected).abs() <= 1e-5 * largest,
                "{actual} is not {expected}; the largest is {largest}"
            );
        }
    }

    /// The full comparison over sizes, layouts and dispatchers is in the workspace's `tests/`.
    #[test]
    fn two_ranks_equal_the_dense_layer() {
        let device = Device::flex().autodiff();
        let config = FSEPMoEConfig::new(8, 12, 4);
        let input = TensorData::new((0..80).map(|i| (0.7 * i as f32).sin()).collect(), [10, 8]);

        let dense = config.init_dense(5, 0, &device).unwrap();
        let x = Tensor::<2>::from_data(input.clone(), &device).require_grad();
        let y = dense.forward(x.clone());
        let grads = (y.clone().square().sum() / 2.0).backward();
        let (expected, expected_grad) = (y.inner().into_data(), x.grad(&grads).unwrap().into_data());

        let outputs = launch(&LaunchConfig::new(2), |comm| {
            let device = Device::flex().autodiff();
            let rank = comm.rank();
            let runtime = FsepRuntimeConfig::new().with_seed(5).init(comm)?;
            let layer = config.init(&runtime, &device);
            let x = Tensor::<2>::from_data(input.clone(), &device).slice([rank * 5..rank * 5 + 5, 0..8]);
            let x = x.detach().require_grad();
            runtime.run(|| {
                let y = layer.forward(x.clone());
                let grads = y.clone().square().sum().backward();
                assert!(layer.experts.weight.val().grad(&grads).is_some());
                (y.inner().into_data(), x.grad(&grads).unwrap().into_data())
            })
        });
        let outputs: Vec<(TensorData, TensorData)> = outputs.into_iter().map(Result::unwrap).collect();
        let rows = |parts: Vec<TensorData>| {
            let parts = parts.into_iter().map(|data| Tensor::<2>::from_data(data, &Device::flex())).collect();
            Tensor::cat(parts, 0)
        };
        let (y, dx): (Vec<_>, Vec<_>) = outputs.into_iter().unzip();
        assert_close(&rows(y).into_data(), &expected);
        // Each rank's gradient is that of its own loss, the dense one that of the mean over ranks.
        assert_close(&(rows(dx) / 2.0).into_data(), &expected_grad);
    }
}
