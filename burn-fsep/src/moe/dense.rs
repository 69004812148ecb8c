use burn::{
    module::{Module, Param},
    tensor::{Device, Tensor, TensorData},
};

use super::{
    MoeOutput, SharedExpert, TokenMask, TopKRouter,
    activate::activate,
    assignments::Assignments,
    forced_router::ForcedRouter,
    losses::{AuxiliaryLosses, LayerRouting, Sequences},
    replicated::Replicated,
    tokens::{from_token_rows, token_rows},
};
use crate::{
    FsepError,
    ops::ExpertActivation,
    shard::{ExpertShape, expert_parameters},
};

/// The same layer as [`FSEPMoE`](super::FSEPMoE) on one rank, written with Burn's own differentiable operations and
/// nothing else of this crate's: the golden reference for values, gradients and loss curves.
#[derive(Module, Debug)]
pub struct DenseMoE {
    /// Chooses the experts.
    pub router: TopKRouter,
    /// Parameters of all experts. `[E, P]`
    pub weight: Param<Tensor<2>>,
    /// Computes all tokens, if there is one.
    pub shared_expert: Option<SharedExpert>,
    #[module(skip)]
    shape: ExpertShape,
    #[module(skip)]
    activation: ExpertActivation,
    #[module(skip)]
    losses: AuxiliaryLosses,
    #[module(skip)]
    forced: Option<ForcedRouter>,
    #[module(skip)]
    layer: usize,
}

impl DenseMoE {
    pub(super) fn new(
        replicated: Replicated,
        shape: ExpertShape,
        num_experts: usize,
        seed: u64,
        device: &Device,
    ) -> Self {
        let Replicated { router, shared_expert, losses, forced, activation, layer } = replicated;
        let expert = |expert| expert_parameters(shape, seed, layer, expert, 0..shape.num_params());
        let values: Vec<f32> = (0..num_experts).flat_map(expert).collect();
        let weight = Param::from_data(TensorData::new(values, [num_experts, shape.num_params()]), device);
        Self { router, weight, shared_expert, shape, activation, losses, forced, layer }
    }

    /// Applies the layer; auxiliary losses are dropped. `[.., D] -> [.., D]`
    ///
    /// # Panics
    ///
    /// If the input is of the wrong shape; see [`DenseMoE::try_forward`].
    pub fn forward<const R: usize>(&self, hidden: Tensor<R>) -> Tensor<R> {
        self.try_forward(hidden).unwrap_or_else(|error| panic!("{error}")).hidden
    }

    /// Applies the layer. `[.., D] -> MoeOutput`
    ///
    /// # Errors
    ///
    /// As [`TopKRouter::forward`].
    pub fn try_forward<const R: usize>(&self, hidden: Tensor<R>) -> Result<MoeOutput<R>, FsepError> {
        self.route_and_compute(hidden, None)
    }

    /// As [`DenseMoE::try_forward`], for the real tokens of a batch alone; the rows of padding are zeros.
    ///
    /// # Errors
    ///
    /// Also [`FsepError::Shape`] if the mask is one of another number of tokens.
    pub fn try_forward_masked<const R: usize>(
        &self,
        hidden: Tensor<R>,
        mask: &TokenMask,
    ) -> Result<MoeOutput<R>, FsepError> {
        self.route_and_compute(hidden, Some(mask))
    }

    fn route_and_compute<const R: usize>(
        &self,
        hidden: Tensor<R>,
        mask: Option<&TokenMask>,
    ) -> Result<MoeOutput<R>, FsepError> {
        let dims = hidden.dims();
        let tokens = token_rows(hidden, mask)?;
        let [num_tokens, width] = tokens.dims();
        let topk = self.router.topk();

        let mut routed = ForcedRouter::or(self.forced.as_ref(), &self.router, tokens.clone())?;
        let assignments = Assignments::new(routed.experts.clone(), self.weight.dims()[0]);
        let counts = assignments.counts(self.layer)?;
        let Assignments { row_of, token_of, .. } = assignments;
        let shared = self.shared_expert.as_ref().map(|shared| shared.forward(tokens.clone()));
        let rows = tokens.select(0, token_of);
        let mut start = 0;
        let mut outputs = Vec::new();
        for (expert, &count) in counts.iter().enumerate() {
            let end = start + count as usize;
            if start < end {
                outputs.push(self.expert(expert, rows.clone().slice([start..end, 0..width])));
            }
            start = end;
        }
        let output = if outputs.is_empty() { rows } else { Tensor::cat(outputs, 0) };
        let by_token = output.select(0, row_of).reshape([num_tokens, topk, width]);
        let output = (by_token * routed.probs.clone().unsqueeze_dim(2)).sum_dim(1).squeeze_dim(1);
        let output = shared.into_iter().fold(output, |output, shared| output + shared);

        let routing = LayerRouting {
            scores: routed.scores.take(),
            expert_loads: counts.iter().map(|&n| u64::from(n)).collect(),
            topk,
            ranks: 1,
        };
        let aux_loss = self.losses.of(routed, &routing, |like| Sequences::new(&dims, mask, like))?;
        Ok(MoeOutput { hidden: from_token_rows(output, dims, mask), aux_loss, routing })
    }

    /// `[m, D] -> [m, D]`
    fn expert(&self, expert: usize, x: Tensor<2>) -> Tensor<2> {
        let ExpertShape { hidden, ffn, gated, bias } = self.shape;
        let params = self.weight.val().slice([expert..expert + 1, 0..self.shape.num_params()]);
        let mut start = 0;
        let mut part = |dims: [usize; 2]| {
            let range = start..start + dims[0] * dims[1];
            start = range.end;
            params.clone().slice([0..1, range]).reshape(dims)
        };
        let gate = gated.then(|| part([ffn, hidden]));
        let (up, down) = (part([ffn, hidden]), part([hidden, ffn]));
        let gate_bias = (gated && bias).then(|| part([1, ffn]));
        let (up_bias, down_bias) = (bias.then(|| part([1, ffn])), bias.then(|| part([1, hidden])));
        let project = |x: Tensor<2>, matrix: Tensor<2>, bias: Option<Tensor<2>>| {
            let output = x.matmul(matrix.transpose());
            bias.into_iter().fold(output, |output, bias| output + bias)
        };
        let gate = gate.map(|gate| project(x.clone(), gate, gate_bias));
        project(activate(self.activation, gate, project(x, up, up_bias)), down, down_bias)
    }
}
