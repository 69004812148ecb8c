//! What the host asks of tensors without gradients, on the device where they are.

use std::{ops::Range, sync::Arc};

use burn::{
    backend::{
        Backend, Dispatch as AnyBackend, TensorMetadata, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, FloatDType, Shape, Slice, Tensor, TensorData, read_sync},
};

use super::{
    assignment_order::{AssignmentOrder, with_dtype},
    row_order::{self, AssignmentPlaces, AssignmentRun, LeadingOrder},
};
use crate::{
    FsepError,
    comm::{Communicator, Operation, PendingDeviceExchange, ReduceOp},
};

/// Order of assignments, counts, reductions and identity as operations of a backend. Without overrides numbers go through
/// host memory, and no tensor is known to be another one.
#[backend_extension(Cube: cfg(feature = "cube"), Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"))]
pub trait FsepDeviceOps: Backend {
    /// Sorts assignments by expert, stably; rows are the sorted assignments. `experts`: `[T * K]`, where `E` means none.
    /// What is no expert and not `E` comes last.
    ///
    /// - `row_of`, `[T * K]`: the row of each assignment `t * K + k`
    /// - `assignment_of`, `[T * K]`: the assignment of each row
    /// - `token_of`, `[T * K]`: the token of each row, `assignment_of / K`
    /// - `ends`, `[E + 2]`: where the rows of each expert, of none, and of what is no expert end
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
        let experts: Vec<i64> = data.iter::<i64>().collect();
        let AssignmentOrder { row_of, assignment_of, ends } = AssignmentOrder::new(&experts, num_experts);
        let token_of = assignment_of.iter().map(|assignment| assignment / topk).collect();
        let upload = |values: Vec<usize>| {
            let values = values.into_iter().map(|value| value as i64).collect();
            Self::int_from_data(with_dtype(values, dtype), &device)
        };
        (upload(row_of), upload(assignment_of), upload(token_of), upload(ends))
    }

    /// `numbers`, the i-th of them `times[i]` times, of the type and on the device of `like`.
    fn fsep_repeated(numbers: Vec<i64>, times: Vec<usize>, like: IntTensor<Self>) -> IntTensor<Self> {
        row_order::repeated::<Self>(&numbers, &times, &like)
    }

    /// Where each assignment goes, `[T * K]` each: the rank that computes it, its row among that rank's slot rows, the first
    /// assignment of its token to that rank, and the rank once more, but `num_ranks` for all that are not such first ones.
    ///
    /// `row_of`, `[T * K]`, with at least one token: the row of each assignment among those sorted by expert; `runs` are these
    /// rows, in order.
    fn fsep_place_assignments(
        row_of: IntTensor<Self>,
        runs: Vec<AssignmentRun>,
        num_ranks: usize,
        topk: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        let by_run = |number: fn(&AssignmentRun) -> i64| {
            let lens = runs.iter().map(|run| run.len).collect();
            Self::fsep_repeated(runs.iter().map(number).collect(), lens, row_of.clone())
        };
        let of_rows = [by_run(|run| run.rank as i64), by_run(|run| run.shift)];
        let (AssignmentPlaces { rank_of, place_of, first_of }, leading) =
            row_order::place_assignments::<Self>(row_of, of_rows, num_ranks, topk);
        (rank_of, place_of, first_of, leading)
    }

    /// Rows of tokens that go once to each rank, by rank and then by token: `lens[r]` to rank `r`, at least as many as there
    /// are; the sum is `U`. The first three are of [`fsep_place_assignments`](Self::fsep_place_assignments), the next three,
    /// with `num_ranks` in place of experts, of what [`fsep_sort_assignments`](Self::fsep_sort_assignments) makes of its fourth.
    ///
    /// - `row_of`, `[T * K]`: the row of each assignment's token for its rank; `-1 - row` unless it is the first of them
    /// - `token_of`, `[U]`: the token of each row; any for rows that none needs
    /// - `places`, `[U * K]`: the row, among the slot rows of the rank that the row goes to, of each of the token's
    ///   assignments; -1 where another rank computes it
    #[allow(clippy::too_many_arguments)]
    fn fsep_lay_out_rows(
        rank_of: IntTensor<Self>,
        place_of: IntTensor<Self>,
        first_of: IntTensor<Self>,
        sorted_row_of: IntTensor<Self>,
        sorted_token_of: IntTensor<Self>,
        ends: IntTensor<Self>,
        lens: Vec<usize>,
        topk: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        let ranks = Self::fsep_repeated((0..lens.len() as i64).collect(), lens.clone(), rank_of.clone());
        let assignments = AssignmentPlaces { rank_of, place_of, first_of };
        let order = LeadingOrder { row_of: sorted_row_of, token_of: sorted_token_of, ends };
        let [row_of, token_of, places] = row_order::lay_out_rows::<Self>(assignments, order, ranks, &lens, topk);
        (row_of, token_of, places)
    }

    /// Indices of the `topk` largest numbers of each row, the largest first and of equal ones the lower index; what is no number
    /// counts as the smallest. `[R, W] -> [R, topk]`, of single precision.
    ///
    /// # Panics
    ///
    /// If the device fails.
    fn fsep_top_k(numbers: FloatTensor<Self>, topk: usize) -> IntTensor<Self> {
        let device = numbers.device();
        let [rows, width] = numbers.shape().dims();
        let data = read_sync(Self::float_into_data(numbers)).expect("the device of the scores answers");
        let data = data.as_slice::<f32>().expect("scores are of single precision");
        let chosen: Vec<i64> = data.chunks_exact(width.max(1)).flat_map(|row| top_k_of(row, topk)).collect();
        Self::int_from_data(TensorData::new(chosen, [rows, topk]), &device)
    }

    /// Sums of squares of parts of a tensor, at least in single precision, whose total is that of all of it. Few enough for the
    /// host to add them up, many enough that single precision does not lose digits. `[len] -> [at most 1024]`
    fn fsep_sums_of_squares(numbers: FloatTensor<Self>) -> FloatTensor<Self> {
        // Half precision is widened first, since squares leave its range.
        let wide = if numbers.dtype() == DType::F64 { numbers } else { Self::float_cast(numbers, FloatDType::F32) };
        sums_of_runs::<Self>(Self::float_mul(wide.clone(), wide))
    }

    /// All ranks' messages, each a `header` and the rank's `ends`, `[E + 2]`, in host memory: `[N, header + E + 2]`.
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

    /// Starts to replace the elements of `tensor`, in place, by their combination over ranks; `None` if the communicator
    /// does not reach tensors on their device. Nobody may use the tensor, or one that shares its memory, before the wait.
    ///
    /// # Errors
    ///
    /// The communicator's, and [`FsepError::Shape`] if the tensor is not contiguous or not of single precision.
    fn fsep_start_device_all_reduce(
        tensor: FloatTensor<Self>,
        comm: Arc<dyn Communicator>,
        operation: Operation,
        op: ReduceOp,
    ) -> Result<Option<Box<dyn PendingDeviceExchange>>, FsepError> {
        let _ = (tensor, comm, operation, op);
        Ok(None)
    }

    /// Whether two tensors are surely the same elements of the same memory. Experts that were prefetched are used only if
    /// their shards are the layer's by this, so a backend that cannot tell has no prefetch in forward.
    fn fsep_is_same(a: FloatTensor<Self>, b: FloatTensor<Self>) -> bool {
        let _ = (a, b);
        false
    }
}

#[cfg(feature = "flex")]
impl FsepDeviceOps for burn::backend::Flex {
    fn fsep_is_same(a: FloatTensor<Self>, b: FloatTensor<Self>) -> bool {
        a.dtype() == b.dtype() && a.layout() == b.layout() && Arc::ptr_eq(&a.data_arc(), &b.data_arc())
    }
}

/// Elements that are summed at once.
pub(super) const RUN: usize = 1024;

/// Sums of runs, and sums of these, until one run is left. `[len] -> [at most RUN]`
pub(super) fn sums_of_runs<B: Backend>(mut numbers: FloatTensor<B>) -> FloatTensor<B> {
    while numbers.shape()[0] > RUN {
        let len = numbers.shape()[0];
        let part = |range: Range<usize>| B::float_slice(numbers.clone(), &[Slice::from(range)]);
        let runs = B::float_reshape(part(0..len / RUN * RUN), Shape::new([len / RUN, RUN]));
        let mut sums = vec![B::float_reshape(B::float_sum_dim(runs, 1), Shape::new([len / RUN]))];
        if !len.is_multiple_of(RUN) {
            sums.push(B::float_sum(part(len / RUN * RUN..len)));
        }
        numbers = if sums.len() == 1 { sums.swap_remove(0) } else { B::float_cat(sums, 0) };
    }
    numbers
}

/// Indices of the largest numbers of a row, as [`FsepDeviceOps::fsep_top_k`] orders them.
pub(super) fn top_k_of(row: &[f32], topk: usize) -> Vec<i64> {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    // Adding 0 makes minus 0 what it is equal to.
    let key = |&index: &u32| {
        let number = row[index as usize] + 0.0;
        if number.is_nan() { f32::NEG_INFINITY } else { number }
    };
    let better = |a: &u32, b: &u32| key(b).total_cmp(&key(a)).then(a.cmp(b));
    if topk < order.len() {
        order.select_nth_unstable_by(topk, better);
        order.truncate(topk);
    }
    order.sort_unstable_by(better);
    order.into_iter().map(i64::from).collect()
}

/// [`FsepDeviceOps::fsep_is_same`] of tensors of any backend, without gradients.
pub fn is_same(a: &Tensor<2>, b: &Tensor<2>) -> bool {
    <AnyBackend as FsepDeviceOps>::fsep_is_same(a.clone().into_dispatch(), b.clone().into_dispatch())
}

/// [`FsepDeviceOps::fsep_sums_of_squares`] of a tensor of any backend, without gradients.
pub fn sums_of_squares<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let len = tensor.shape().num_elements();
    Tensor::from_dispatch(<AnyBackend as FsepDeviceOps>::fsep_sums_of_squares(tensor.reshape([len]).into_dispatch()))
}

/// [`FsepDeviceOps::fsep_gather_ends`] for communicators that do not reach the device.
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
