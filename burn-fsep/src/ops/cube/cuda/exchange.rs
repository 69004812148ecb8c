//! NCCL on CubeCL's memory: between tensors on the GPU, without a detour through host memory.

use burn::{
    backend::ops::FloatTensorOps,
    tensor::{FloatDType, Shape},
};
use burn_cubecl::{
    CubeBackend, kernel::into_contiguous, ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor,
};

use super::{
    super::super::tensor_exchange::{PendingDevice, PendingTensor, start_host_exchange},
    stream::{gpu_of, on_stream},
};
use crate::{
    FsepError,
    comm::{
        CommError, Communicator, ComputeStream, DeviceCommunicator, ExchangePlan, Operation, PendingDeviceExchange,
    },
};

/// The communicator's side on the tensor's GPU, if it has one there.
fn on_gpu<'a>(tensor: &CubeTensor, comm: &'a dyn Communicator) -> Option<&'a dyn DeviceCommunicator> {
    let gpu = gpu_of(&tensor.device)?;
    comm.device().filter(|device| device.gpu() == gpu)
}

/// The tensors' addresses, and the stream of this thread, on which all that they depend on is queued.
fn places(tensors: &[&CubeTensor]) -> Result<(ComputeStream, Vec<u64>), FsepError> {
    on_stream(tensors, |stream, addresses| Ok((ComputeStream::from_raw(stream as u64), addresses.to_vec())))
}

/// Keeps an exchange's tensors until it was waited for.
struct PendingOnStream {
    pending: Option<Box<dyn PendingDeviceExchange>>,
    tensors: Vec<CubeTensor>,
}

impl PendingOnStream {
    /// Also lets the memory of tensors that another stream allocated be kept until this one has waited.
    fn join(&mut self) -> Result<(), CommError> {
        let Some(pending) = self.pending.take() else { return Ok(()) };
        let waited = pending.wait();
        let tensors = std::mem::take(&mut self.tensors);
        // Nothing is queued: that the stream knows the tensors is what keeps them. Where it fails the device is lost.
        let _ = on_stream(&tensors.iter().collect::<Vec<_>>(), |_, _| Ok(()));
        waited
    }
}

impl PendingDeviceExchange for PendingOnStream {
    fn wait(mut self: Box<Self>) -> Result<(), CommError> {
        self.join()
    }
}

impl Drop for PendingOnStream {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

/// As [`fsep_start_exchange`](super::super::super::FsepKernels::fsep_start_exchange).
pub(in super::super) fn start_exchange(
    tensor: CubeTensor,
    comm: &dyn Communicator,
    operation: Operation,
    plan: &ExchangePlan,
) -> Result<PendingTensor<CubeBackend>, FsepError> {
    let Some(device) = on_gpu(&tensor, comm) else {
        return start_host_exchange::<CubeBackend>(tensor, comm, operation, plan);
    };
    let send = into_contiguous(tensor);
    let elements = send.meta.num_elements();
    if elements != plan.send_len {
        return Err(FsepError::Shape {
            what: format!("elements to send in `{operation}`"),
            expected: plan.send_len.to_string(),
            actual: elements.to_string(),
        });
    }
    let dtype = send.dtype;
    // What no block covers has to be something: a padded shard never is.
    let covered: usize = plan.recvs.iter().map(|block| block.len).sum();
    let shape = Shape::new([plan.recv_len]);
    let recv = if covered == plan.recv_len {
        empty_device_contiguous_dtype(send.client.clone(), send.device.clone(), shape, dtype)
    } else {
        CubeBackend::float_zeros(shape, &send.device, FloatDType::from(dtype))
    };
    let plan = plan.scaled(dtype.size());
    let (stream, addresses) = places(&[&send, &recv])?;
    // SAFETY: both are contiguous tensors of the plan's lengths on the communicator's GPU; `PendingOnStream` keeps them until it has
    // waited, and CubeCL reuses their memory in the order of that stream.
    let pending = unsafe { device.start_device_all_to_all_v(operation, addresses[0], addresses[1], &plan, stream) }?;
    // While a clone of `send` lives, Burn takes no handle for the only one, so nobody writes there while it travels.
    let pending = PendingOnStream { pending: Some(pending), tensors: vec![send.clone(), recv.clone()] };
    Ok(PendingTensor::Device(PendingDevice::new(Box::new(pending), send, recv)))
}
