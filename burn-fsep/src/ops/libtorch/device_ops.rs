use std::sync::Arc;

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Device, Tensor};

use super::{
    super::{
        FsepDeviceOps,
        device_ops::{gather_through_host, sums_of_runs},
    },
    reduce, routing,
};
use crate::{
    FsepError,
    comm::{Communicator, Operation, PendingDeviceExchange, ReduceOp},
};

impl FsepDeviceOps for LibTorch {
    fn fsep_sort_assignments(
        experts: TchTensor,
        num_experts: usize,
        topk: usize,
    ) -> (TchTensor, TchTensor, TchTensor, TchTensor) {
        let sorted = routing::sort(&experts.tensor, num_experts as i64, topk as i64);
        let [row_of, assignment_of, token_of, ends] =
            sorted.unwrap_or_else(|error| panic!("{error}")).map(TchTensor::new);
        (row_of, assignment_of, token_of, ends)
    }

    fn fsep_repeated(numbers: Vec<i64>, times: Vec<usize>, like: TchTensor) -> TchTensor {
        let repeated = routing::repeated(&numbers, &times, &like.tensor);
        TchTensor::new(repeated.unwrap_or_else(|error| panic!("{error}")))
    }

    fn fsep_top_k(numbers: TchTensor, topk: usize) -> TchTensor {
        TchTensor::new(routing::top_k(&numbers.tensor, topk).unwrap_or_else(|error| panic!("{error}")))
    }

    fn fsep_sums_of_squares(numbers: TchTensor) -> TchTensor {
        let sums = reduce::sums_of_squares(&numbers.tensor).unwrap_or_else(|error| panic!("{error}"));
        sums_of_runs::<Self>(TchTensor::new(sums))
    }

    fn fsep_gather_ends(
        ends: TchTensor,
        header: Vec<u32>,
        comm: Arc<dyn Communicator>,
        operation: Operation,
    ) -> Result<Vec<u32>, FsepError> {
        let on_gpu = match ends.tensor.device() {
            Device::Cuda(index) => comm.device().filter(|device| device.gpu() == index && comm.size() > 1),
            _ => None,
        };
        let Some(device) = on_gpu else {
            return gather_through_host::<Self>(ends, header, comm.as_ref(), operation);
        };
        let gathered = routing::gather_on_gpu(&ends.tensor, &header, device, comm.size(), operation)?;
        // If a rank was lost meanwhile, what was read is garbage.
        match comm.failure() {
            Some(failure) => Err(failure.seen_from(&operation.to_string()).into()),
            None => Ok(gathered),
        }
    }

    fn fsep_start_device_all_reduce(
        tensor: TchTensor,
        comm: Arc<dyn Communicator>,
        operation: Operation,
        op: ReduceOp,
    ) -> Result<Option<Box<dyn PendingDeviceExchange>>, FsepError> {
        reduce::start(tensor, comm.as_ref(), operation, op)
    }

    fn fsep_is_same(a: TchTensor, b: TchTensor) -> bool {
        let (a, b) = (a.tensor, b.tensor);
        let layout = |tensor: &Tensor| (tensor.kind(), tensor.device(), tensor.size(), tensor.stride());
        a.data_ptr() == b.data_ptr() && layout(&a) == layout(&b)
    }
}
