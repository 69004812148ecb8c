use burn::{
    module::{Module, Param},
    tensor::{Device, Tensor, TensorData, activation::silu},
};

use super::{
    MoeOutput, TokenMask, TopKRouter,
    assignments::Assignments,
    forced_router::ForcedRouter,
    losses::AuxiliaryLosses,
    tokens::{from_token_rows, token_rows},
};
use crate::{
    FsepError,
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
    #[module(skip)]
    shape: ExpertShape,
    #[module(skip)]
    losses: AuxiliaryLosses,
    #[module(skip)]
    forced: Option<ForcedRouter>,
    #[module(skip)]
    layer: usize,
}

impl DenseMoE {
    pub(super) fn new(
        (router, forced): (TopKRouter, Option<ForcedRouter>),
        shape: ExpertShape,
        num_experts: usize,
        losses: AuxiliaryLosses,
        seed: u64,
        layer: usize,
        device: &Device,
    ) -> Self {
        let expert = |expert| expert_parameters(shape, seed, layer, expert, 0..shape.num_params());
        let values: Vec<f32> = (0..num_experts).flat_map(expert).collect();
        let weight = Param::from_data(TensorData::new(values, [num_experts, shape.num_params()]), device);
        Self { router, weight, shape, losses, forced, layer }
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

        let routed = ForcedRouter::or(self.forced.as_ref(), &self.router, tokens.clone())?;
        let assignments = Assignments::new(routed.experts, self.weight.dims()[0]);
        let counts = assignments.counts(self.layer)?;
        let Assignments { row_of, token_of, .. } = assignments;
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
        let output = (by_token * routed.probs.unsqueeze_dim(2)).sum_dim(1).squeeze_dim(1);

        let totals: Vec<u64> = counts.iter().map(|&n| u64::from(n)).collect();
        let aux_loss = self.losses.of(routed.scores, routed.logits, &totals, topk, 1)?;
        Ok(MoeOutput { hidden: from_token_rows(output, dims, mask), aux_loss })
    }

    /// `[m, D] -> [m, D]`
    fn expert(&self, expert: usize, x: Tensor<2>) -> Tensor<2> {
        let ExpertShape { hidden, ffn } = self.shape;
        let params = self.weight.val().slice([expert..expert + 1, 0..self.shape.num_params()]);
        let matrix = |part: usize, dims: [usize; 2]| {
            let len = hidden * ffn;
            params.clone().slice([0..1, part * len..(part + 1) * len]).reshape(dims).transpose()
        };
        let gate = silu(x.clone().matmul(matrix(0, [ffn, hidden])));
        let up = x.matmul(matrix(1, [ffn, hidden]));
        (gate * up).matmul(matrix(2, [hidden, ffn]))
    }
}
