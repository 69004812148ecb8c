use std::{fmt, ops::Range, sync::Arc};

use burn::{
    module::{Module, Param},
    tensor::{DType, Device, Int, Tensor, TensorData},
};
use burn_fsep_planner::RoutingCounts;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{RouterOutput, assignments::Assignments, tokens::check_dtype};
use crate::{
    FsepError, FsepRuntime,
    burn_compat::{Metadata, is_reparameterized},
    ops::{self, BesideTokens, LayerSpec, Tracked, WeightStorage, chunk_ranges},
    runtime::PassStart,
    shard::{ExpertShape, expert_parameters, foreign_owner, shard_id},
};

/// A rank's part of the experts of a layer: computes tokens by the experts that a router gives them.
///
/// [`FSEPMoE`](super::FSEPMoE) has them beside its own router. With a router of your own, make them by
/// [`FSEPMoEConfig::init_experts`](super::FSEPMoEConfig::init_experts):
///
/// ```
/// # use burn::tensor::{Device, Distribution, Tensor, activation::sigmoid};
/// # use burn_fsep::{FSEPMoEConfig, FsepRuntime, moe::RouterOutput};
/// # let (runtime, device) = (FsepRuntime::single(), Device::flex());
/// let experts = FSEPMoEConfig::new(8, 16, 4).with_moe_router_topk(2).init_experts(&runtime, &device);
/// # let router = Tensor::<2>::random([8, 4], Distribution::Default, &device);
/// # let tokens = Tensor::<2>::random([10, 8], Distribution::Default, &device);
/// let (probs, chosen) = sigmoid(tokens.clone().matmul(router)).topk_with_indices(2, 1);
/// let output = experts.forward(tokens, RouterOutput::new(probs, chosen));
/// assert_eq!((output.hidden.dims(), output.counts.total()), ([10, 8], 20));
/// ```
///
/// A module of its own so that visitors can tell shards from replicated parameters: shards differ between ranks, their
/// gradients are complete after backward and must not be averaged over ranks.
#[derive(Module, Debug)]
pub struct FsepExperts {
    // Before the parameters, so that visitors know what they meet.
    info: Metadata<ExpertsInfo>,
    /// Shards `[E, S]` of all experts, or whole resident experts `[E / N, P]`.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    spec: Arc<LayerSpec>,
    #[module(skip)]
    runtime: FsepRuntime,
}

/// Output of [`FsepExperts`].
#[derive(Debug, Clone)]
pub struct FsepExpertsOutput {
    /// The weighted sum of the chosen experts' outputs. `[T, D]`
    pub hidden: Tensor<2>,
    /// Routing counts of the ranks that share the experts. `[N, E]`
    pub counts: Arc<RoutingCounts>,
    /// Assignments of each expert, on all ranks: auxiliary losses need them. Shape `[E]`.
    pub expert_loads: Vec<u64>,
}

/// What [`FsepExperts::compute`] has computed.
pub(super) struct Computed {
    pub output: FsepExpertsOutput,
    /// What the work beside the tokens' travel has returned, if there was some.
    pub beside: Option<Tensor<2>>,
}

/// No work beside the tokens' travel.
const NO_WORK: Option<fn() -> Tensor<2>> = None;

impl FsepExperts {
    pub(super) fn new(spec: Arc<LayerSpec>, runtime: &FsepRuntime, device: &Device) -> Self {
        let LayerSpec { layer, rank, num_ranks, num_experts, shape, .. } = *spec;
        let (experts, positions) = match spec.storage {
            WeightStorage::Sharded => (0..num_experts, rank * spec.shard_len()..(rank + 1) * spec.shard_len()),
            WeightStorage::Resident => {
                let owned = num_experts / num_ranks;
                (rank * owned..(rank + 1) * owned, 0..shape.num_params())
            }
        };
        let dims = [experts.len(), positions.len()];
        let mut values = Vec::with_capacity(dims[0] * dims[1]);
        experts.for_each(|e| values.extend(expert_parameters(shape, runtime.seed(), layer, e, positions.clone())));
        let mut weight = Param::<Tensor<2>>::from_data(TensorData::new(values, dims), device);
        weight.id = shard_id(rank, num_ranks);
        Self { info: Metadata(ExpertsInfo::new(&spec)), weight, spec, runtime: runtime.clone() }
    }

    /// Computes each token by the experts that `routed` gives it, on whatever ranks they are, and sums their outputs weighted by
    /// `routed.probs`. Collective: all ranks call it, also with no token. `[T, D] -> [T, D]`
    ///
    /// Gradients reach the tokens, the probabilities and the experts. `routed.scores` and `routed.logits` are not used.
    ///
    /// # Panics
    ///
    /// If a collective fails or the input or the routing is of the wrong shape. Inside [`FsepRuntime::run`] the panic becomes a
    /// typed error; [`FsepExperts::try_forward`] returns it.
    pub fn forward(&self, tokens: Tensor<2>, routed: RouterOutput) -> FsepExpertsOutput {
        self.compute(tokens, routed, NO_WORK).map_or_else(|error| self.runtime.fail(error), |computed| computed.output)
    }

    /// [`FsepExperts::forward`] in [`FsepRuntime::run`]: after an error the group is spent. `[T, D] -> [T, D]`
    ///
    /// # Errors
    ///
    /// [`FsepError::Shape`] if tokens or routing are of the wrong shape or type, or a rank's routing names an expert that there is
    /// not; [`FsepError::NoExpert`] if it has none for some token; otherwise as [`FSEPMoE::try_forward`](super::FSEPMoE::try_forward).
    pub fn try_forward(&self, tokens: Tensor<2>, routed: RouterOutput) -> Result<FsepExpertsOutput, FsepError> {
        self.runtime.run(|| self.forward(tokens, routed))
    }

    /// The index of this layer in its runtime.
    pub fn layer_index(&self) -> usize {
        self.spec().layer
    }

    /// The runtime of this layer's rank.
    pub fn runtime(&self) -> &FsepRuntime {
        &self.runtime
    }

    fn spec(&self) -> &Arc<LayerSpec> {
        &self.spec
    }

    /// Whether the layer takes tokens of this type and width.
    pub(super) fn check_input(&self, dtype: DType, width: usize) -> Result<(), FsepError> {
        // The router's weight may be another one for this pass: that of `GradientBuckets`.
        check_dtype(dtype, self.spec().input_dtype(self.weight.dtype()))?;
        let hidden = self.spec().shape.hidden;
        if width == hidden {
            return Ok(());
        }
        Err(FsepError::Shape {
            what: "hidden size of the MoE layer's input".into(),
            expected: hidden.to_string(),
            actual: width.to_string(),
        })
    }

    /// [`FsepExperts::forward`] with work that is done while tokens travel to the experts.
    pub(super) fn compute(
        &self,
        tokens: Tensor<2>,
        routed: RouterOutput,
        beside: Option<impl FnOnce() -> Tensor<2> + Send + 'static>,
    ) -> Result<Computed, FsepError> {
        let (spec, [num_tokens, width], dtype) = (self.spec(), tokens.dims(), tokens.dtype());
        self.check_input(dtype, width)?;
        self.check_weight()?;
        let RouterOutput { probs, experts, .. } = routed;
        for (what, actual) in [("probs", probs.dims()), ("experts", experts.dims())] {
            if actual != [num_tokens, spec.topk] {
                return Err(FsepError::Shape {
                    what: format!("`{what}` of the router's output"),
                    expected: format!("[T, K] = [{num_tokens}, {}]", spec.topk),
                    actual: format!("{actual:?}"),
                });
            }
        }
        let probs = probs.cast(dtype);
        let experts = experts.inner();
        let sort = |range: Range<usize>| {
            let experts = match range.len() {
                len if len == num_tokens => experts.clone(),
                // Burn narrows to no rows of none.
                0 => Tensor::zeros([0, spec.topk], (&experts.device(), experts.dtype())),
                len => experts.clone().narrow(0, range.start, len),
            };
            (range, Assignments::new(experts, spec.num_experts))
        };
        let chunks: Vec<_> = chunk_ranges(num_tokens, self.runtime.token_chunks()).map(sort).collect();
        let weights = self.weight.val();
        let tracked = Tracked { hidden: tokens.is_tracked(), probs: probs.is_tracked(), weights: weights.is_tracked() };
        let result = Arc::new(Mutex::new(None));
        let beside = beside.map(|work| {
            let result = result.clone();
            Box::new(move || *result.lock() = Some(work())) as BesideTokens
        });
        let start = PassStart {
            chunks: chunks.iter().map(|(range, assignments)| assignments.start(range.clone())).collect(),
            tracked,
            weights: weights.clone(),
            param: self.weight.id,
            beside,
        };
        let (pass, loads) = self.runtime.begin_pass(spec, start)?;
        let indices = chunks.into_iter().zip(&pass.dispatch.chunks).map(|((_, assignments), chunk)| {
            let Assignments { row_of, assignment_of, token_of, .. } = assignments;
            match &chunk.rank_rows {
                None => [row_of, assignment_of, token_of],
                Some(rows) => [rows.row_of.clone(), rows.places.clone(), rows.token_of.clone()],
            }
        });
        let [row_of, assignment_of, token_of] = cat_chunks(indices);
        let hidden = ops::moe(tokens, probs, weights, row_of, assignment_of, token_of, pass.clone());
        let expert_loads = self.runtime.end_forward(&pass, &hidden, loads)?;
        let output = FsepExpertsOutput { hidden, counts: pass.dispatch.counts.clone(), expert_loads };
        Ok(Computed { output, beside: result.lock().take() })
    }

    /// Whether the parameters are what this rank was given of them: a user can load, or attach, anything else.
    fn check_weight(&self) -> Result<(), FsepError> {
        let LayerSpec { layer, rank, num_ranks, .. } = **self.spec();
        if self.spec().is_sharded()
            && let Some(other) = foreign_owner(self.weight.id, rank, num_ranks)
        {
            let [rank, other] = [rank, other].map(|rank| self.runtime.groups().experts().world_rank(rank));
            return Err(FsepError::Config(format!(
                "layer {layer} of rank {rank} has the shards of rank {other}: each rank has to save and load a record of its own \
                 (burn_fsep::checkpoint does, and loads with any number of ranks), and to make its own model"
            )));
        }
        if is_reparameterized(&self.weight) {
            return Err(FsepError::Config(format!(
                "the experts of layer {layer} are reparameterized (LoRA), but what a rank has of them are no matrices of the model: \
                 leave `experts.weight` out (`ParamGroup::exclude`)"
            )));
        }
        Ok(())
    }
}

/// The index tensors of all chunks, of which there is one at least, one behind the other.
fn cat_chunks(chunks: impl Iterator<Item = [Tensor<1, Int>; 3]>) -> [Tensor<1, Int>; 3] {
    let mut all: [Vec<_>; 3] = Default::default();
    for chunk in chunks {
        all.iter_mut().zip(chunk).for_each(|(all, tensor)| all.push(tensor));
    }
    all.map(|mut chunks| if chunks.len() == 1 { chunks.swap_remove(0) } else { Tensor::cat(chunks, 0) })
}

/// What a rank's parameters are a part of, as visitors learn it: a shard's length does not tell the expert's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExpertsInfo {
    /// The layer's number in its runtime.
    pub layer: usize,
    /// Experts `E`.
    pub num_experts: usize,
    /// Sizes of an expert.
    pub shape: ExpertShape,
    /// How this rank keeps its part.
    pub storage: WeightStorage,
}

impl ExpertsInfo {
    pub fn new(spec: &LayerSpec) -> Self {
        let LayerSpec { layer, num_experts, shape, storage, .. } = *spec;
        Self { layer, num_experts, shape, storage }
    }
}

impl fmt::Display for ExpertsInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of D = {}, F = {}", self.num_experts, self.shape.hidden, self.shape.ffn)
    }
}
