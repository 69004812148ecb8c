//! The two ways in which a chunk's tokens travel: a row for each of a token's experts, or for each rank that has any of them.

use burn::{
    backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Shape, Slice},
};

use super::{
    ChunkDispatch, FsepKernels, LayerPass, by_assignment,
    by_rank::{self, RankRowIndices, Routes},
    row_exchange::{GRADIENTS_BACK, TOKENS_BACK, TravellingRows},
    types::RowIndices,
};
use crate::FsepError;

/// Index tensors of the rows that a chunk's tokens travel in.
#[derive(Debug, Clone)]
pub(super) enum PassRows<B: Backend> {
    /// One for each of a token's experts.
    ByAssignment(RowIndices<B>),
    /// One for each rank that computes any of a token's experts.
    ByRank(RankRowIndices<B>),
}

/// Tokens on their way to the experts.
pub(super) enum TravellingTokens<B: Backend> {
    ByAssignment(TravellingRows<B>),
    ByRank(by_rank::Travelling<B>),
}

/// Gradients of the experts' outputs on their way to the experts.
pub(super) enum TravellingGradients<B: Backend> {
    ByAssignment(Option<TravellingRows<B>>, Option<FloatTensor<B>>),
    ByRank(TravellingRows<B>),
}

/// The gradient of the probabilities, if it is wanted.
pub(super) enum ProbsGradient<B: Backend> {
    Here(Option<FloatTensor<B>>),
    Travelling(Option<TravellingRows<B>>),
}

/// What the tokens' way keeps for backward.
#[derive(Debug, Clone)]
pub(super) struct SavedRows<B: Backend> {
    /// `[T, K]`
    pub probs: FloatTensor<B>,
    /// The experts' outputs, if the router is trained: by row, `[T * K, D]`, or by slot, `[M, D]`.
    pub outputs: Option<FloatTensor<B>>,
    rows: PassRows<B>,
    /// What came with tokens that travel once to a rank.
    routes: Option<Routes<B>>,
}

/// A tensor of all chunks, part by part.
struct Parts<B: Backend> {
    all: IntTensor<B>,
    is_one: bool,
    taken: usize,
}

impl<B: Backend> Parts<B> {
    fn new(all: IntTensor<B>, chunks: &[ChunkDispatch]) -> Self {
        Self { all, is_one: chunks.len() == 1, taken: 0 }
    }

    fn take(&mut self, len: usize) -> IntTensor<B> {
        if self.is_one {
            return self.all.clone();
        }
        let start = self.taken;
        self.taken += len;
        if len == 0 {
            return B::int_zeros(Shape::new([0]), &self.all.device(), self.all.dtype().into());
        }
        B::int_slice(self.all.clone(), &[Slice::from(start..start + len)])
    }
}

impl<B: FsepKernels> PassRows<B> {
    /// Of each chunk, from the index tensors of [`FsepOps::fsep_moe`](super::FsepOps::fsep_moe).
    pub fn of_chunks(
        row_of: IntTensor<B>,
        assignment_of: IntTensor<B>,
        token_of: IntTensor<B>,
        pass: &LayerPass,
    ) -> Vec<Self> {
        let chunks = &pass.dispatch.chunks;
        let (mut row_of, mut assignment_of, mut token_of) = (
            Parts::<B>::new(row_of, chunks),
            Parts::<B>::new(assignment_of, chunks),
            Parts::<B>::new(token_of, chunks),
        );
        let of_chunk = |chunk: &ChunkDispatch| {
            let (topk, row_of) = (pass.spec.topk, row_of.take(chunk.range.len() * pass.spec.topk));
            match &chunk.rank_rows {
                None => {
                    let [assignment_of, token_of] =
                        [&mut assignment_of, &mut token_of].map(|parts| parts.take(chunk.range.len() * topk));
                    Self::ByAssignment(RowIndices { row_of, assignment_of, token_of })
                }
                Some(rows) => {
                    let num_rows = rows.exchange.send_len;
                    let (places, token_of) = (assignment_of.take(num_rows * topk), token_of.take(num_rows));
                    Self::ByRank(RankRowIndices { row_of, places, token_of })
                }
            }
        };
        chunks.iter().map(of_chunk).collect()
    }

    /// `hidden`: `[T, D]`, `probs`: `[T, K]`
    pub fn start_tokens(
        &self,
        hidden: FloatTensor<B>,
        probs: &FloatTensor<B>,
        pass: &LayerPass,
        chunk: &ChunkDispatch,
    ) -> Result<TravellingTokens<B>, FsepError> {
        Ok(match self {
            Self::ByAssignment(rows) => {
                TravellingTokens::ByAssignment(by_assignment::start_tokens::<B>(hidden, rows, pass, chunk)?)
            }
            Self::ByRank(rows) => {
                TravellingTokens::ByRank(by_rank::start_tokens::<B>(hidden, probs, rows, pass, chunk)?)
            }
        })
    }

    /// The tokens by slot, `[M, D]`, when they have come.
    pub fn wait_for_tokens(
        self,
        travelling: TravellingTokens<B>,
        probs: FloatTensor<B>,
        pass: &LayerPass,
        chunk: &ChunkDispatch,
    ) -> Result<(FloatTensor<B>, SavedRows<B>), FsepError> {
        let (tokens, routes) = match (&self, travelling) {
            (Self::ByRank(rows), TravellingTokens::ByRank(travelling)) => {
                let (tokens, routes) = travelling.wait(rows, pass, chunk)?;
                (tokens, Some(routes))
            }
            (_, TravellingTokens::ByAssignment(travelling)) => (travelling.wait()?, None),
            _ => unreachable!("tokens travel as they were started"),
        };
        Ok((tokens, SavedRows { probs, outputs: None, rows: self, routes }))
    }
}

impl<B: FsepKernels> SavedRows<B> {
    fn routes(&self) -> &Routes<B> {
        self.routes.as_ref().expect("tokens that travel once to a rank come with routes")
    }

    /// Starts the experts' outputs by slot, `[M, D]`, on their way back; keeps what the router's gradient needs of them here, if
    /// wanted.
    pub fn return_outputs(
        &mut self,
        outputs: FloatTensor<B>,
        pass: &LayerPass,
        chunk: &ChunkDispatch,
        keep: bool,
    ) -> Result<TravellingRows<B>, FsepError> {
        match &self.rows {
            PassRows::ByAssignment(_) => by_assignment::start_back::<B>(outputs, pass, chunk, TOKENS_BACK),
            PassRows::ByRank(_) => {
                let returning = by_rank::return_outputs::<B>(&outputs, self.routes(), pass, chunk)?;
                self.outputs = keep.then_some(outputs);
                Ok(returning)
            }
        }
    }

    /// The outputs combined by token, `[T, D]`, when they have come; keeps what the router's gradient needs of them, if wanted.
    pub fn combine(
        &mut self,
        returning: TravellingRows<B>,
        pass: &LayerPass,
        keep: bool,
    ) -> Result<FloatTensor<B>, FsepError> {
        match &self.rows {
            PassRows::ByAssignment(rows) => {
                let [returned, combined] = by_assignment::combine::<B>(returning, rows, &self.probs)?;
                self.outputs = keep.then_some(returned);
                Ok(combined)
            }
            PassRows::ByRank(rows) => by_rank::sum_by_token::<B>(returning, rows, pass),
        }
    }

    /// Starts the gradients of the output, `[T, D]`, on their way to the experts.
    pub fn start_gradients(
        &mut self,
        grad: FloatTensor<B>,
        pass: &LayerPass,
        chunk: &ChunkDispatch,
        want_rows: bool,
    ) -> Result<TravellingGradients<B>, FsepError> {
        Ok(match &self.rows {
            PassRows::ByAssignment(rows) => {
                let outputs = self.outputs.take();
                let (rows, probs) =
                    by_assignment::start_gradients::<B>(grad, outputs, rows, &self.probs, pass, chunk, want_rows)?;
                TravellingGradients::ByAssignment(rows, probs)
            }
            PassRows::ByRank(rows) => {
                TravellingGradients::ByRank(by_rank::start_gradients::<B>(grad, rows, pass, chunk)?)
            }
        })
    }

    /// Gradients of the experts' outputs, `[M, D]`, if wanted, and of the probabilities, maybe on their way back.
    pub fn wait_for_gradients(
        &mut self,
        travelling: TravellingGradients<B>,
        pass: &LayerPass,
        chunk: &ChunkDispatch,
        want_rows: bool,
    ) -> Result<(Option<FloatTensor<B>>, ProbsGradient<B>), FsepError> {
        match travelling {
            TravellingGradients::ByAssignment(rows, probs) => {
                Ok((rows.map(TravellingRows::wait).transpose()?, ProbsGradient::Here(probs)))
            }
            TravellingGradients::ByRank(rows) => {
                let outputs = self.outputs.take();
                let (gradients, routes) = (rows.wait()?, self.routes());
                let (rows, probs) =
                    by_rank::spread_gradients::<B>(gradients, outputs.as_ref(), routes, pass, chunk, want_rows)?;
                Ok((rows, ProbsGradient::Travelling(probs)))
            }
        }
    }

    /// The gradient of the probabilities, `[T, K]`, when it has come.
    pub fn wait_for_probs(&self, gradient: ProbsGradient<B>) -> Result<Option<FloatTensor<B>>, FsepError> {
        match (gradient, &self.rows) {
            (ProbsGradient::Travelling(Some(travelling)), PassRows::ByRank(rows)) => {
                Ok(Some(by_rank::gather_probs::<B>(travelling.wait()?, rows, &self.probs)))
            }
            (ProbsGradient::Here(probs), _) => Ok(probs),
            (ProbsGradient::Travelling(_), _) => Ok(None),
        }
    }

    /// Starts the gradients of the experts' inputs, `[M, D]`, on their way back.
    pub fn return_gradients(
        &self,
        gradients: FloatTensor<B>,
        pass: &LayerPass,
        chunk: &ChunkDispatch,
    ) -> Result<TravellingRows<B>, FsepError> {
        match &self.rows {
            PassRows::ByAssignment(_) => by_assignment::start_back::<B>(gradients, pass, chunk, GRADIENTS_BACK),
            PassRows::ByRank(_) => by_rank::return_gradients::<B>(gradients, self.routes(), pass, chunk),
        }
    }

    /// Their sums by token, `[T, D]`, when they have come.
    pub fn sum_gradients(&self, returning: TravellingRows<B>, pass: &LayerPass) -> Result<FloatTensor<B>, FsepError> {
        match &self.rows {
            PassRows::ByAssignment(rows) => by_assignment::sum_gradients::<B>(returning, rows, pass),
            PassRows::ByRank(rows) => by_rank::sum_by_token::<B>(returning, rows, pass),
        }
    }
}
