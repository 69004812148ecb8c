use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_cubecl::CubeBackend;

use super::{super::FsepDeviceOps, sort::sort_assignments, top_k::top_k};

impl FsepDeviceOps for CubeBackend {
    fn fsep_sort_assignments(
        experts: IntTensor<Self>,
        num_experts: usize,
        topk: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        let [row_of, assignment_of, token_of, ends] = sort_assignments(experts, num_experts, topk);
        (row_of, assignment_of, token_of, ends)
    }

    fn fsep_top_k(numbers: FloatTensor<Self>, topk: usize) -> IntTensor<Self> {
        top_k(numbers, topk)
    }

    /// The id of an allocation is never used again, and two handles of one keep Burn from writing in place.
    fn fsep_is_same(a: FloatTensor<Self>, b: FloatTensor<Self>) -> bool {
        let [place_a, place_b] = [&a, &b].map(|tensor| {
            let handle = &tensor.handle;
            (handle.service, handle.memory.descriptor().id, handle.offset_start, handle.offset_end)
        });
        place_a == place_b && a.dtype == b.dtype && a.meta == b.meta
    }
}
