//! All-to-All-v of whole rows.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};

use super::{FsepKernels, LayerPass, tensor_exchange::PendingTensor};
use crate::{FsepError, comm::ExchangePlan};

// What exchanges of tokens are for, in the order of a pass.
pub(super) const TOKENS_OUT: &str = "tokens to experts in forward";
pub(super) const ROUTES_OUT: &str = "weights and places of tokens in forward";
pub(super) const TOKENS_BACK: &str = "outputs to tokens in forward";
pub(super) const GRADIENTS_OUT: &str = "gradients to experts in backward";
pub(super) const PROBS_BACK: &str = "gradients of weights in backward";
pub(super) const GRADIENTS_BACK: &str = "gradients to tokens in backward";

/// Rows on their way to other ranks.
pub(super) enum TravellingRows<B: Backend> {
    /// They stay where they are.
    Here(FloatTensor<B>),
    Travelling(PendingTensor<B>, [usize; 2]),
}

impl<B: FsepKernels> TravellingRows<B> {
    /// `[rows received, D]`
    pub fn wait(self) -> Result<FloatTensor<B>, FsepError> {
        match self {
            Self::Here(rows) => Ok(rows),
            Self::Travelling(pending, dims) => pending.wait(dims),
        }
    }
}

/// Starts an All-to-All-v of whole rows. `[rows sent, D] -> [rows received, D]`
pub(super) fn start_rows<B: FsepKernels>(
    rows: FloatTensor<B>,
    pass: &LayerPass,
    plan: &ExchangePlan,
    name: &'static str,
) -> Result<TravellingRows<B>, FsepError> {
    if pass.spec.num_ranks == 1 && rows.shape()[0] == plan.send_len && plan.is_identity(0) {
        return Ok(TravellingRows::Here(rows));
    }
    let width = rows.shape()[1];
    let operation = pass.operation(name);
    let pending = B::fsep_start_exchange(rows, pass.context.tokens.as_ref(), operation, &plan.scaled(width))?;
    Ok(TravellingRows::Travelling(pending, [plan.recv_len, width]))
}
