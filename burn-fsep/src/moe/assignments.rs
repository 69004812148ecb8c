use std::ops::Range;

use burn::{
    backend::Dispatch as AnyBackend,
    tensor::{Int, Tensor},
};

use crate::{
    FsepError,
    ops::{FsepDeviceOps, counts_of},
    runtime::ChunkStart,
};

/// The assignments (token, expert) of one rank, and their order by expert, on the device.
///
/// Assignment `t * K + k` is the `k`-th choice of token `t`; rows are assignments sorted by expert, stably.
#[derive(Debug)]
pub(super) struct Assignments {
    /// Where the rows of each expert, of none, and of what is no expert end. `[E + 2]`
    pub ends: Tensor<1, Int>,
    /// Row of each assignment. `[T * K]`
    pub row_of: Tensor<1, Int>,
    /// Assignment of each row. `[T * K]`
    pub assignment_of: Tensor<1, Int>,
    /// Token of each row. `[T * K]`
    pub token_of: Tensor<1, Int>,
}

impl Assignments {
    /// Sorts assignments by expert. `experts`: `[T, K]`, without autodiff; `E` where a token has none.
    pub fn new(experts: Tensor<2, Int>, num_experts: usize) -> Self {
        let [tokens, topk] = experts.dims();
        let experts = experts.reshape([tokens * topk]).into_dispatch();
        let (row_of, assignment_of, token_of, ends) =
            <AnyBackend as FsepDeviceOps>::fsep_sort_assignments(experts, num_experts, topk);
        let [ends, row_of, assignment_of, token_of] =
            [ends, row_of, assignment_of, token_of].map(Tensor::from_dispatch);
        Self { ends, row_of, assignment_of, token_of }
    }

    /// What the routing of these tokens begins with.
    pub fn start(&self, range: Range<usize>) -> ChunkStart {
        ChunkStart { range, ends: self.ends.clone(), row_of: self.row_of.clone() }
    }

    /// Reads the number of assignments of each expert, on the one rank of a layer. Shape `[E]`.
    ///
    /// # Errors
    ///
    /// [`FsepError::NoExpert`] if a token has no expert, [`FsepError::Device`] if the device cannot be read.
    pub fn counts(&self, layer: usize) -> Result<Vec<u32>, FsepError> {
        let ends = self.ends.clone().try_into_data().map_err(|error| FsepError::Device(error.to_string()))?;
        let ends: Vec<u32> = ends.iter::<i64>().map(|end| end as u32).collect();
        Ok(counts_of(&ends, layer, 0)?.collect())
    }
}
