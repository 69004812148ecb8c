//! Means of gradients over the ranks that have the same shards.

use std::sync::Arc;

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{FloatDType, Shape, TensorData},
};

use super::{FsepKernels, tensor_exchange::into_host, types::cast};
use crate::{
    FsepError,
    comm::{Communicator, Operation, PendingAllReduce, PendingDeviceExchange, ReduceOp},
};

/// The mean over ranks of a gradient, in single precision whatever its type, under way: between devices where the communicator reaches them, else through host memory.
pub(super) enum PendingMean<B: Backend> {
    Device(Box<dyn PendingDeviceExchange>, FloatTensor<B>, Shape),
    Host(PendingAllReduce<f32>, Arc<dyn Communicator>, burn::backend::tensor::Device<B>, Shape),
}

impl<B: FsepKernels> PendingMean<B> {
    /// Starts the mean; in single precision, whatever the gradient's type. Collective.
    ///
    /// # Errors
    ///
    /// The communicator's, and [`FsepError::Device`] if the gradient cannot be read.
    pub fn start(
        gradient: FloatTensor<B>,
        comm: Arc<dyn Communicator>,
        operation: Operation,
    ) -> Result<Self, FsepError> {
        let (shape, device) = (gradient.shape(), gradient.device());
        if comm.device().is_some() {
            // In memory of its own: it will be overwritten.
            let row = B::float_reshape(gradient, Shape::new([shape.num_elements()]));
            let row = B::float_mul_scalar(cast::<B>(row, Some(FloatDType::F32)), 1.0.into());
            let pending = B::fsep_start_device_all_reduce(row.clone(), comm.clone(), operation, ReduceOp::Mean)?;
            if let Some(pending) = pending {
                return Ok(Self::Device(pending, row, shape));
            }
            return Self::start_on_host(row, comm, operation, shape, device);
        }
        Self::start_on_host(gradient, comm, operation, shape, device)
    }

    fn start_on_host(
        gradient: FloatTensor<B>,
        comm: Arc<dyn Communicator>,
        operation: Operation,
        shape: Shape,
        device: burn::backend::tensor::Device<B>,
    ) -> Result<Self, FsepError> {
        let values: Vec<f32> = into_host::<B>(gradient)?.iter::<f32>().collect();
        let pending = PendingAllReduce::start(comm.as_ref(), operation, values, ReduceOp::Mean)?;
        Ok(Self::Host(pending, comm, device, shape))
    }

    /// Waits for the mean, of single precision. Collective.
    ///
    /// # Errors
    ///
    /// The communicator's.
    pub fn wait(self) -> Result<FloatTensor<B>, FsepError> {
        match self {
            Self::Device(pending, row, shape) => {
                pending.wait()?;
                Ok(B::float_reshape(row, shape))
            }
            Self::Host(pending, comm, device, shape) => {
                let values = pending.wait(comm.as_ref())?;
                Ok(B::float_from_data(TensorData::new(values, shape), &device))
            }
        }
    }
}
