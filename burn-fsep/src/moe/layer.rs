use burn::{module::Module, tensor::Tensor};

use super::{
    FsepExperts, FsepExpertsOutput, SharedExpert, TokenMask, TopKRouter,
    experts::Computed,
    forced_router::ForcedRouter,
    losses::{AuxiliaryLosses, LayerRouting, Sequences},
    replicated::Replicated,
    tokens::{from_token_rows, token_rows},
};
use crate::{FsepError, FsepRuntime};

/// A Mixture-of-Experts feed-forward layer whose experts are fully sharded over ranks.
///
/// It is router, experts, maybe a shared expert, and auxiliary losses; with another router, use [`FsepExperts`] alone.
///
/// Each token is computed by its `K` best experts, and by the shared one if there is one; no token is dropped. For any world size, layout and
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
    /// Computes all tokens, if there is one, while tokens travel to the experts that the router chose.
    pub shared_expert: Option<SharedExpert>,
    #[module(skip)]
    pub(super) losses: AuxiliaryLosses,
    /// Routes in place of `router`, with its weight.
    #[module(skip)]
    pub(super) forced: Option<ForcedRouter>,
}

/// Output of an MoE layer.
#[derive(Debug, Clone)]
pub struct MoeOutput<const D: usize> {
    /// As the input: `[.., D]`.
    pub hidden: Tensor<D>,
    /// Sum of the auxiliary losses that are switched on, in single precision, to be added to the rank's loss as it is: the mean
    /// over ranks is the loss of all ranks' tokens. `[1]`
    pub aux_loss: Option<Tensor<1>>,
    /// How tokens were routed, for losses over several layers.
    pub routing: LayerRouting,
}

impl FSEPMoE {
    pub(super) fn new(experts: FsepExperts, replicated: Replicated) -> Self {
        let Replicated { router, shared_expert, losses, forced, .. } = replicated;
        Self { router, experts, shared_expert, losses, forced }
    }

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
        self.route_and_compute(hidden, None).unwrap_or_else(|error| self.runtime().fail(error))
    }

    /// As [`FSEPMoE::forward_with_losses`], for the real tokens of a batch alone: output, losses, gradients, statistics and
    /// planning are those of the batch without its padding, of which nothing is sent. The rows of padding are zeros. All of a
    /// rank's tokens may be padding. `[.., D] -> MoeOutput`
    ///
    /// # Panics
    ///
    /// As [`FSEPMoE::forward`]; with [`FsepError::Shape`] also if the mask is one of another number of tokens.
    pub fn forward_masked<const R: usize>(&self, hidden: Tensor<R>, mask: &TokenMask) -> MoeOutput<R> {
        self.route_and_compute(hidden, Some(mask)).unwrap_or_else(|error| self.runtime().fail(error))
    }

    /// Applies the layer and returns what went wrong: short for [`FsepRuntime::run`] around
    /// [`FSEPMoE::forward_with_losses`]. It tries for all ranks, not for this one alone: after an error the group is spent.
    /// `[.., D] -> MoeOutput`
    ///
    /// # Errors
    ///
    /// [`FsepError::Shape`] for an input of the wrong shape; [`FsepError::Divergence`] if ranks do not agree on the
    /// layer; [`FsepError::NoExpert`] if a rank's router has logits that are no numbers; [`FsepError::Config`] if ranks have other options for it, or its experts
    /// are another rank's shards or reparameterized; [`FsepError::Comm`] if a collective fails; [`FsepError::Panicked`] if the backend panics.
    pub fn try_forward<const R: usize>(&self, hidden: Tensor<R>) -> Result<MoeOutput<R>, FsepError> {
        self.runtime().run(|| self.forward_with_losses(hidden))
    }

    /// The index of this layer in its runtime.
    pub fn layer_index(&self) -> usize {
        self.experts.layer_index()
    }

    /// The runtime of this layer's rank.
    pub fn runtime(&self) -> &FsepRuntime {
        self.experts.runtime()
    }

    fn route_and_compute<const R: usize>(
        &self,
        hidden: Tensor<R>,
        mask: Option<&TokenMask>,
    ) -> Result<MoeOutput<R>, FsepError> {
        let dims = hidden.dims();
        self.experts.check_input(hidden.dtype(), dims[R - 1])?;
        let tokens = token_rows(hidden, mask)?;
        let mut routed = ForcedRouter::or(self.forced.as_ref(), &self.router, tokens.clone())?;
        let scores = routed.scores.take();
        let beside = self.shared_expert.clone().map(|shared| {
            let tokens = tokens.clone();
            move || shared.forward(tokens)
        });
        let Computed { output: FsepExpertsOutput { hidden, expert_loads, .. }, beside } =
            self.experts.compute(tokens, routed.clone(), beside)?;
        let hidden = beside.into_iter().fold(hidden, |hidden, shared| hidden + shared);
        let ranks = self.runtime().world_size();
        let routing = LayerRouting { scores, expert_loads, topk: self.router.topk(), ranks };
        let aux_loss = self.losses.of(routed, &routing, |like| Sequences::new(&dims, mask, like))?;
        Ok(MoeOutput { hidden: from_token_rows(hidden, dims, mask), aux_loss, routing })
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
