use burn_tch::TchTensor;
use tch::{Device, Kind, TchError, Tensor};

use super::super::device_ops::RUN;

use crate::{
    FsepError,
    comm::{CommError, Communicator, ComputeStream, Operation, PendingDeviceExchange, ReduceOp},
};

/// A reduction of a tensor, which it keeps alive.
struct PendingReduction {
    // Dropped first: it waits for the reduction, after which the tensor's memory may be used again.
    pending: Box<dyn PendingDeviceExchange>,
    _tensor: TchTensor,
}

impl PendingDeviceExchange for PendingReduction {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        let Self { pending, _tensor } = *self;
        pending.wait()
    }
}

/// Sums of squares of runs of elements: one look at each element, also in half precision. `[len] -> [ceil(len / RUN)]`
pub(super) fn sums_of_squares(numbers: &Tensor) -> Result<Tensor, TchError> {
    let kind = if numbers.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let (len, run) = (numbers.numel() as i64, RUN as i64);
    let whole = len / run * run;
    let norms = |numbers: Tensor| numbers.f_linalg_norm(2.0, [1i64].as_slice(), false, kind)?.f_square_();
    let runs = norms(numbers.f_narrow(0, 0, whole)?.f_reshape([-1, run])?)?;
    if whole == len {
        return Ok(runs);
    }
    Tensor::f_cat(&[runs, norms(numbers.f_narrow(0, whole, len - whole)?.f_reshape([1, -1])?)?], 0)
}

/// As [`FsepDeviceOps::fsep_start_device_all_reduce`](crate::ops::FsepDeviceOps::fsep_start_device_all_reduce).
pub(super) fn start(
    tensor: TchTensor,
    comm: &dyn Communicator,
    operation: Operation,
    op: ReduceOp,
) -> Result<Option<Box<dyn PendingDeviceExchange>>, FsepError> {
    let Device::Cuda(index) = tensor.tensor.device() else { return Ok(None) };
    let Some(device) = comm.device().filter(|device| device.gpu() == index) else { return Ok(None) };
    if tensor.tensor.kind() != Kind::Float || !tensor.tensor.is_contiguous() {
        return Err(FsepError::Shape {
            what: format!("tensor of `{operation}`"),
            expected: "contiguous f32".into(),
            actual: format!("{:?} with strides {:?}", tensor.tensor.kind(), tensor.tensor.stride()),
        });
    }
    let (address, len) = (tensor.tensor.data_ptr() as u64, tensor.tensor.numel());
    // SAFETY: a contiguous tensor of `len` numbers in single precision on the communicator's GPU; `PendingReduction`
    // keeps it until it has waited, and LibTorch's allocator reuses its memory in the order of the default stream.
    let pending =
        unsafe { device.start_device_all_reduce(operation, address, len, op, ComputeStream::LEGACY_DEFAULT) }?;
    Ok(Some(Box::new(PendingReduction { pending, _tensor: tensor })))
}
