//! All-to-All-v of tensors: through host memory, which works for every backend and every communicator, or between
//! buffers on the GPU.

use std::sync::Arc;

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{Bytes, DType, Shape, TensorData, read_sync},
};

use crate::{
    FsepError,
    comm::{Communicator, ExchangePlan, Operation, PendingDeviceExchange, PendingExchange},
};

/// An All-to-All-v of a tensor's elements that was started and not waited for yet.
pub enum PendingTensor<B: Backend> {
    /// Through host memory.
    Host(PendingHost<B>),
    /// Between tensors on one device.
    #[cfg_attr(not(any(feature = "libtorch", all(feature = "cuda", feature = "nccl"))), allow(dead_code))]
    Device(PendingDevice<B>),
}

/// An exchange through host memory.
pub struct PendingHost<B: Backend> {
    pending: Box<dyn PendingExchange>,
    recv_len: usize,
    dtype: DType,
    device: burn::backend::tensor::Device<B>,
}

/// An exchange between tensors on one device, which it keeps alive.
pub struct PendingDevice<B: Backend> {
    // Dropped first: it waits for the exchange, after which the tensors' memory may be used again.
    pending: Box<dyn PendingDeviceExchange>,
    received: FloatTensor<B>,
    _sent: FloatTensor<B>,
}

impl<B: Backend> PendingDevice<B> {
    #[cfg_attr(not(any(feature = "libtorch", all(feature = "cuda", feature = "nccl"))), allow(dead_code))]
    /// The exchange `pending` of elements of `sent`, contiguous, into `received`, shape `[plan.recv_len]`.
    pub fn new(pending: Box<dyn PendingDeviceExchange>, sent: FloatTensor<B>, received: FloatTensor<B>) -> Self {
        Self { pending, received, _sent: sent }
    }
}

/// What an exchange brought.
pub(super) enum Received<B: Backend> {
    /// In host memory.
    Host(Bytes, DType),
    /// On the device, as one row of elements.
    Device(FloatTensor<B>),
}

/// Starts an All-to-All-v of `tensor` through host memory; `plan` counts elements.
///
/// # Errors
///
/// [`FsepError::Device`] if the tensor cannot be read, or the communicator's.
pub fn start_host_exchange<B: Backend>(
    tensor: FloatTensor<B>,
    comm: &dyn Communicator,
    operation: Operation,
    plan: &ExchangePlan,
) -> Result<PendingTensor<B>, FsepError> {
    let device = tensor.device();
    let data = into_host::<B>(tensor)?;
    let dtype = data.dtype();
    let pending = comm.start_all_to_all_v(operation, Arc::new(data.into_bytes()), plan.scaled(dtype.size()))?;
    Ok(PendingTensor::Host(PendingHost { pending, recv_len: plan.recv_len, dtype, device }))
}

impl<B: Backend> PendingTensor<B> {
    /// The same exchange for a backend that wraps this one. `tensor` gives its tensor for one of this backend's, and `pending` an
    /// exchange between tensors that also does what the wrapper has to do before it waits.
    #[cfg(all(feature = "cuda", feature = "nccl"))]
    pub(super) fn wrapped<W: Backend>(
        self,
        device: burn::backend::tensor::Device<W>,
        tensor: impl Fn(FloatTensor<B>) -> FloatTensor<W>,
        pending: impl FnOnce(Box<dyn PendingDeviceExchange>) -> Box<dyn PendingDeviceExchange>,
    ) -> PendingTensor<W> {
        match self {
            PendingTensor::Host(PendingHost { pending, recv_len, dtype, .. }) => {
                PendingTensor::Host(PendingHost { pending, recv_len, dtype, device })
            }
            PendingTensor::Device(exchange) => PendingTensor::Device(PendingDevice {
                pending: pending(exchange.pending),
                received: tensor(exchange.received),
                _sent: tensor(exchange._sent),
            }),
        }
    }

    /// Waits for the exchange; the received elements as a tensor of `shape`.
    pub(super) fn wait(self, shape: impl Into<Shape>) -> Result<FloatTensor<B>, FsepError> {
        match self {
            PendingTensor::Host(host) => {
                let device = host.device.clone();
                let (bytes, dtype) = host.wait()?;
                Ok(B::float_from_data(TensorData::from_bytes(bytes, shape, dtype), &device))
            }
            PendingTensor::Device(device) => Ok(B::float_reshape(device.wait()?, shape.into())),
        }
    }

    /// Waits for the exchange; the received elements where they are.
    pub(super) fn wait_raw(self) -> Result<Received<B>, FsepError> {
        match self {
            PendingTensor::Host(host) => host.wait().map(|(bytes, dtype)| Received::Host(bytes, dtype)),
            PendingTensor::Device(device) => device.wait().map(Received::Device),
        }
    }
}

impl<B: Backend> PendingHost<B> {
    fn wait(self) -> Result<(Bytes, DType), FsepError> {
        // Backends that hand their work over in batches are to compute what was queued while the host waits.
        B::flush(&self.device).map_err(|error| FsepError::Device(error.to_string()))?;
        let mut bytes = aligned_zeros(self.recv_len, self.dtype);
        self.pending.wait(&mut bytes)?;
        Ok((bytes, self.dtype))
    }
}

impl<B: Backend> PendingDevice<B> {
    fn wait(self) -> Result<FloatTensor<B>, FsepError> {
        let Self { pending, received, _sent } = self;
        pending.wait()?;
        Ok(received)
    }
}

/// The elements of a tensor in host memory.
pub(super) fn into_host<B: Backend>(tensor: FloatTensor<B>) -> Result<TensorData, FsepError> {
    read_sync(B::float_into_data(tensor)).map_err(|error| FsepError::Device(error.to_string()))
}

/// A zeroed buffer aligned for elements of `dtype`.
fn aligned_zeros(len: usize, dtype: DType) -> Bytes {
    match dtype.size() {
        2 => Bytes::from_elems(vec![0u16; len]),
        8 => Bytes::from_elems(vec![0u64; len]),
        _ => Bytes::from_elems(vec![0u32; len]),
    }
}
