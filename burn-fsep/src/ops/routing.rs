//! From the router's choice to the order of the assignments and all ranks' counts, on the device where the choice is.

use std::sync::Arc;

use burn::{
    backend::{Backend, TensorMetadata, backend_extension, tensor::IntTensor},
    tensor::{DType, TensorData, read_sync},
};

use crate::{
    FsepError,
    comm::{Communicator, Operation},
};

/// What happens between router and experts, as operations of a backend. Without overrides it happens in host memory.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"))]
pub trait RoutingOps: Backend {
    /// Sorts assignments by expert, stably; rows are the sorted assignments. `experts`: `[T * K]`, each at most `E`, where
    /// `E` means none.
    ///
    /// - `row_of`, `[T * K]`: the row of each assignment `t * K + k`
    /// - `assignment_of`, `[T * K]`: the assignment of each row
    /// - `token_of`, `[T * K]`: the token of each row, `assignment_of / K`
    /// - `ends`, `[E + 1]`: where the rows of each expert, and those of none, end
    ///
    /// # Panics
    ///
    /// If the device fails.
    fn fsep_sort_assignments(
        experts: IntTensor<Self>,
        num_experts: usize,
        topk: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        let device = experts.device();
        let data = read_sync(Self::int_into_data(experts)).expect("the device of the choice answers");
        let dtype = data.dtype();
        let experts: Vec<usize> = data.iter::<i64>().map(|expert| expert as usize).collect();
        let Sorted { row_of, assignment_of, ends } = Sorted::new(&experts, num_experts);
        let token_of = assignment_of.iter().map(|assignment| assignment / topk).collect();
        let upload = |values| Self::int_from_data(with_dtype(values, dtype), &device);
        (upload(row_of), upload(assignment_of), upload(token_of), upload(ends))
    }

    /// All ranks' messages, each a `header` and the rank's `ends`, `[E + 1]`, in host memory: `[N, header + E + 1]`.
    /// The host waits once, for all of it. Collective.
    ///
    /// # Errors
    ///
    /// The communicator's, and [`FsepError::Device`] if `ends` cannot be read.
    fn fsep_gather_ends(
        ends: IntTensor<Self>,
        header: Vec<u32>,
        comm: Arc<dyn Communicator>,
        operation: Operation,
    ) -> Result<Vec<u32>, FsepError> {
        gather_through_host::<Self>(ends, header, comm.as_ref(), operation)
    }
}

/// What is wrong with logits of which some token has no expert.
pub(crate) const NOT_FINITE: &str = "not finite: its input or weights are not (did training diverge?)";

/// Assignments of each expert, from where their rows end. `[E + 1] -> [E]`
pub(crate) fn counts_of(ends: &[u32]) -> impl Iterator<Item = u32> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(ends).map(|(start, end)| end - start).take(ends.len() - 1)
}

/// [`RoutingOps::fsep_gather_ends`] for communicators that do not reach the device.
pub(super) fn gather_through_host<B: Backend>(
    ends: IntTensor<B>,
    header: Vec<u32>,
    comm: &dyn Communicator,
    operation: Operation,
) -> Result<Vec<u32>, FsepError> {
    let ends = read_sync(B::int_into_data(ends)).map_err(|error| FsepError::Device(error.to_string()))?;
    let mut message = header;
    message.extend(ends.iter::<i64>().map(|end| end as u32));
    let mut all = vec![0u32; message.len() * comm.size()];
    comm.all_gather(operation, bytemuck::cast_slice(&message), bytemuck::cast_slice_mut(&mut all))?;
    Ok(all)
}

#[cfg(feature = "flex")]
impl RoutingOps for burn::backend::Flex {}

/// Built in the device's own type: Burn would convert number by number.
fn with_dtype(values: Vec<usize>, dtype: DType) -> TensorData {
    let len = [values.len()];
    match dtype {
        DType::I64 => TensorData::new(values.into_iter().map(|value| value as i64).collect(), len),
        DType::I32 => TensorData::new(values.into_iter().map(|value| value as i32).collect(), len),
        _ => TensorData::new(values.into_iter().map(|value| value as i64).collect(), len).convert_dtype(dtype),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Sorted {
    row_of: Vec<usize>,
    assignment_of: Vec<usize>,
    ends: Vec<usize>,
}

impl Sorted {
    /// Counting sort.
    fn new(experts: &[usize], num_experts: usize) -> Self {
        let mut ends = vec![0; num_experts + 1];
        experts.iter().for_each(|&expert| ends[expert] += 1);
        let mut next = Vec::with_capacity(ends.len());
        let mut start = 0;
        for end in &mut ends {
            next.push(start);
            start += *end;
            *end = start;
        }
        let mut row_of = Vec::with_capacity(experts.len());
        let mut assignment_of = vec![0; experts.len()];
        for (assignment, &expert) in experts.iter().enumerate() {
            let row = &mut next[expert];
            row_of.push(*row);
            assignment_of[*row] = assignment;
            *row += 1;
        }
        Self { row_of, assignment_of, ends }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_stable() {
        let sorted = Sorted::new(&[2, 0, 1, 2, 4, 0, 1], 4);
        assert_eq!(sorted.ends, [2, 4, 6, 6, 7]);
        assert_eq!(sorted.assignment_of, [1, 5, 2, 6, 0, 3, 4]);
        assert_eq!(sorted.row_of, [4, 0, 2, 5, 6, 1, 3]);
    }
}
