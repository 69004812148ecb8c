use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Device, TchError, Tensor};

use super::{
    super::tensor_exchange::{PendingDevice, PendingTensor, start_host_exchange},
    kernels::device_error,
};
use crate::{
    FsepError,
    comm::{Communicator, ComputeStream, ExchangePlan, Operation},
};

/// Between tensors on the GPU if the communicator has them there, else through host memory. `plan` counts elements.
pub(super) fn start(
    tensor: TchTensor,
    comm: &dyn Communicator,
    operation: Operation,
    plan: &ExchangePlan,
) -> Result<PendingTensor<LibTorch>, FsepError> {
    let gpu = match tensor.tensor.device() {
        Device::Cuda(index) => comm.device().filter(|device| device.gpu() == index),
        _ => None,
    };
    let Some(comm) = gpu else { return start_host_exchange::<LibTorch>(tensor, comm, operation, plan) };
    let buffers = || -> Result<(Tensor, Tensor), TchError> {
        let send = tensor.tensor.f_contiguous()?;
        // What no block covers has to be something: a padded shard never is.
        let covered: usize = plan.recvs.iter().map(|block| block.len).sum();
        let (len, options) = ([plan.recv_len as i64], (send.kind(), send.device()));
        let recv =
            if covered == plan.recv_len { Tensor::f_empty(len, options)? } else { Tensor::f_zeros(len, options)? };
        Ok((send, recv))
    };
    let (send, recv) = buffers().map_err(device_error)?;
    if send.numel() != plan.send_len {
        return Err(FsepError::Shape {
            what: format!("elements to send in `{operation}`"),
            expected: plan.send_len.to_string(),
            actual: send.numel().to_string(),
        });
    }
    let plan = plan.scaled(send.kind().elt_size_in_bytes());
    let address = |tensor: &Tensor| tensor.data_ptr() as u64;
    // SAFETY: both are contiguous tensors of the plan's lengths on the communicator's GPU; `PendingDevice` keeps them until
    // it has waited, and LibTorch's allocator reuses their memory in the order of the default stream.
    let pending = unsafe {
        comm.start_device_all_to_all_v(operation, address(&send), address(&recv), &plan, ComputeStream::LEGACY_DEFAULT)
    }?;
    // With the tensor's own storage: while it travels, Burn must not take another handle for the only one and write to it.
    let send = TchTensor::from_existing(send, tensor.storage);
    Ok(PendingTensor::Device(PendingDevice::new(pending, send, TchTensor::new(recv))))
}
