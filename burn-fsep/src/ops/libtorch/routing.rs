use tch::{Kind, TchError, Tensor};

use super::{
    cuda::{Fused, upload},
    kernels::device_error,
};
use crate::{
    FsepError,
    comm::{ComputeStream, DeviceCommunicator, Operation},
};

/// Header and ends go out together: no wait for this rank's own numbers comes before that for all.
pub(super) fn gather_on_gpu(
    ends: &Tensor,
    header: &[u32],
    comm: &dyn DeviceCommunicator,
    ranks: usize,
    operation: Operation,
) -> Result<Vec<u32>, FsepError> {
    let message = || {
        let header = upload(bytemuck::cast_slice(header), ends.device())?;
        Tensor::f_cat(&[header, ends.f_to_kind(Kind::Int)?], 0)
    };
    let message = message().map_err(device_error)?;
    let len = message.numel();
    let all = Tensor::f_empty([(len * ranks) as i64], (Kind::Int, ends.device())).map_err(device_error)?;
    let (send, recv) = (message.data_ptr() as u64, all.data_ptr() as u64);
    // SAFETY: contiguous tensors of `len` and `ranks * len` numbers of four bytes on the communicator's GPU, both alive until
    // the exchange was waited for; LibTorch's allocator reuses their memory in the order of the default stream.
    unsafe { comm.start_device_all_gather(operation, send, recv, 4 * len, ComputeStream::LEGACY_DEFAULT) }?.wait()?;
    let numbers = Vec::<i32>::try_from(&all).map_err(device_error)?;
    Ok(bytemuck::cast_vec(numbers))
}

/// Queued on the device: the host waits for nothing.
pub(super) fn sort(experts: &Tensor, num_experts: i64, topk: i64) -> Result<[Tensor; 4], TchError> {
    let (len, device) = (experts.numel() as i64, experts.device());
    // Radix sort takes a pass for every few bits; `ends` compares with E + 2.
    let kind = match num_experts + 2 {
        ..=255 => Kind::Uint8,
        256..=32_767 => Kind::Int16,
        _ => Kind::Int,
    };
    // What is no expert becomes E + 1; -1 does, too, as a remainder.
    let experts = experts.f_clamp(-1, num_experts + 1)?.f_remainder_(num_experts + 2)?;
    let (sorted, assignment_of) = experts.f_to_kind(kind)?.f_sort_stable(true, 0, false)?;
    let rows = Tensor::f_arange(len, (Kind::Int64, device))?;
    let row_of = rows.f_empty_like()?.f_scatter_(0, &assignment_of, &rows)?;
    let token_of = assignment_of.f_floor_divide_scalar(topk)?;
    let bounds = Tensor::f_arange_start(1, num_experts + 3, (kind, device))?;
    let ends = bounds.f_searchsorted(&sorted, false, false, "left", None::<Tensor>)?;
    Ok([row_of, assignment_of, token_of, ends])
}

/// As [`FsepDeviceOps::fsep_repeated`](super::super::FsepDeviceOps::fsep_repeated); the host waits for nothing.
pub(super) fn repeated(numbers: &[i64], times: &[usize], like: &Tensor) -> Result<Tensor, TchError> {
    const NON_BLOCKING: bool = true;
    let len = times.iter().sum::<usize>() as i64;
    let both: Vec<i64> = numbers.iter().copied().chain(times.iter().map(|&times| times as i64)).collect();
    let both = Tensor::f_from_slice(&both)?.f_internal_to_copy((Kind::Int64, like.device()), NON_BLOCKING)?;
    let part = |start: usize| both.f_narrow(0, start as i64, numbers.len() as i64);
    let repeated = part(0)?.f_repeat_interleave_self_tensor(&part(numbers.len())?, 0, len)?;
    repeated.f_to_kind(like.kind())
}

/// As [`FsepDeviceOps::fsep_top_k`](super::super::FsepDeviceOps::fsep_top_k).
pub(super) fn top_k(numbers: &Tensor, topk: usize) -> Result<Tensor, TchError> {
    let numbers = numbers.f_contiguous()?;
    if let Some(chosen) = Fused::top_k(&numbers, topk)? {
        return Ok(chosen);
    }
    // A stable sort leaves equal numbers in the order of their indices. Of numbers that are none it would take the first.
    let smallest = f64::NEG_INFINITY;
    let numbers = numbers.f_nan_to_num(smallest, f64::INFINITY, smallest)?;
    let (_, order) = numbers.f_sort_stable(true, 1, true)?;
    order.f_narrow(1, 0, topk as i64)?.f_contiguous()
}

#[cfg(test)]
mod tests {
    use super::{super::super::device_ops::top_k_of, *};

    /// On the first GPU if there is one, else on the CPU.
    #[test]
    fn the_largest_numbers_are_those_found_in_host_memory() {
        let device = if tch::Cuda::is_available() { tch::Device::Cuda(0) } else { tch::Device::Cpu };
        for (rows, width, topk) in [(0, 8, 2), (1, 1, 1), (5, 3, 3), (1000, 64, 8), (333, 257, 6), (7, 2048, 40)] {
            // Few different numbers, so that many are equal, and some that are none.
            let numbers = Tensor::randint_low(-3, 4, [rows, width], (Kind::Float, tch::Device::Cpu));
            let numbers = numbers.where_scalarother(&numbers.ge(-2.5), f64::NAN) * 0.5;
            let chosen = Vec::<i64>::try_from(top_k(&numbers.to_device(device), topk).unwrap().flatten(0, 1)).unwrap();
            let numbers = Vec::<f32>::try_from(numbers.flatten(0, 1)).unwrap();
            let expected: Vec<i64> = numbers.chunks(width as usize).flat_map(|row| top_k_of(row, topk)).collect();
            assert_eq!(chosen, expected, "{rows} rows of {width}, {topk}");
        }
    }

    #[test]
    fn equals_the_order_found_in_host_memory() {
        for (num_experts, len) in [(1, 0), (4, 1), (8, 1000), (254, 3000), (255, 3000), (40_000, 5000)] {
            let experts = Tensor::randint_low(-2, num_experts + 4, [len], (Kind::Int64, tch::Device::Cpu));
            let [row_of, assignment_of, token_of, ends] = sort(&experts, num_experts, 2).unwrap();
            let numbers = |tensor: &Tensor| Vec::<i64>::try_from(tensor).unwrap();
            let is_known = |expert: &i64| (0..=num_experts).contains(expert);
            let chosen: Vec<i64> =
                numbers(&experts).into_iter().map(|e| if is_known(&e) { e } else { num_experts + 1 }).collect();
            let mut order: Vec<i64> = (0..len).collect();
            order.sort_by_key(|&assignment| chosen[assignment as usize]);
            assert_eq!(numbers(&assignment_of), order);
            assert_eq!(numbers(&token_of), order.iter().map(|assignment| assignment / 2).collect::<Vec<_>>());
            assert!(order.iter().enumerate().all(|(row, &of)| numbers(&row_of)[of as usize] == row as i64));
            let count = |expert| chosen.iter().filter(|&&e| e <= expert).count() as i64;
            assert!((0..=num_experts + 1).zip(numbers(&ends)).all(|(expert, end)| end == count(expert)));
        }
    }
}
