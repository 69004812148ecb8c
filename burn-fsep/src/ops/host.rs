//! Communication through host memory: works for every backend and every communicator.

use std::sync::Arc;

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{Bytes, DType, Shape, TensorData, read_sync},
};

use crate::{
    FsepError,
    comm::{Communicator, ExchangePlan, Operation, PendingExchange},
};

/// An All-to-All-v of a tensor's elements that was started and not waited for yet.
pub(super) struct PendingTensor<B: Backend> {
    pending: Box<dyn PendingExchange>,
    recv_len: usize,
    dtype: DType,
    device: burn::backend::tensor::Device<B>,
}

/// Starts an All-to-All-v of `tensor`; `plan` counts elements.
pub(super) fn start_exchange<B: Backend>(
    tensor: FloatTensor<B>,
    comm: &dyn Communicator,
    operation: Operation,
    plan: &ExchangePlan,
) -> Result<PendingTensor<B>, FsepError> {
    let device = tensor.device();
    let data = into_host::<B>(tensor)?;
    let dtype = data.dtype();
    let pending = comm.start_all_to_all_v(operation, Arc::new(data.into_bytes()), plan.scaled(dtype.size()))?;
    Ok(PendingTensor { pending, recv_len: plan.recv_len, dtype, device })
}

impl<B: Backend> PendingTensor<B> {
    /// Bytes of one element.
    pub fn element_size(&self) -> usize {
        self.dtype.size()
    }

    /// Waits for the exchange; the received elements as a tensor of `shape`.
    pub fn wait(self, shape: impl Into<Shape>) -> Result<FloatTensor<B>, FsepError> {
        let device = self.device.clone();
        let (bytes, dtype) = self.wait_bytes()?;
        Ok(B::float_from_data(TensorData::from_bytes(bytes, shape, dtype), &device))
    }

    /// Waits for the exchange; the received elements as bytes.
    pub fn wait_bytes(self) -> Result<(Bytes, DType), FsepError> {
        let mut bytes = aligned_zeros(self.recv_len, self.dtype);
        self.pending.wait(&mut bytes)?;
        Ok((bytes, self.dtype))
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
