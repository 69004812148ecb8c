use std::sync::Arc;

use burn::{
    backend::{Dispatch, DispatchTensor, TensorMetadata, ops::FloatTensorOps},
    tensor::{DType, Device, FloatDType, Shape, Tensor, TensorData},
};

use crate::{
    FsepError,
    comm::{Communicator, Operation, PendingDeviceExchange, ReduceBuffer, ReduceOp},
    ops::FsepDeviceOps,
};

const OPERATION: Operation = Operation::new("replicated gradients");

/// A rank's part of a mean.
// How large a tensor of Burn's is depends on the backends that are built.
#[allow(clippy::large_enum_variant)]
pub(super) enum Part {
    /// A gradient of any shape.
    Gradient(DispatchTensor),
    /// Zeros: this rank has no gradient.
    Zeros(usize, Device),
}

/// The mean over ranks of some gradients, under way: on the device where the communicator reaches it, else through host
/// memory at the time of the wait.
pub(super) struct Reduction {
    /// The gradients one after the other, in single precision.
    flat: Tensor<1>,
    comm: Arc<dyn Communicator>,
    pending: Option<Box<dyn PendingDeviceExchange>>,
}

impl Reduction {
    /// Starts the mean of `parts`, of which there is one at least. Waits for nobody, so it can be called between any
    /// other collectives, but all ranks start the same reductions in the same order.
    ///
    /// # Errors
    ///
    /// The communicator's.
    pub fn start(comm: &Arc<dyn Communicator>, parts: Vec<Part>) -> Result<Self, FsepError> {
        let flat = flatten(parts);
        let pending = <Dispatch as FsepDeviceOps>::fsep_start_device_all_reduce(
            flat.clone().into_dispatch(),
            comm.clone(),
            OPERATION,
            ReduceOp::Mean,
        )?;
        Ok(Self { flat, comm: comm.clone(), pending })
    }

    /// Reduces `len` zeros if that happens on a device. Collective: NCCL connects ranks when it first reduces that many, and
    /// waits for all of them, which [`Reduction::start`] must not.
    ///
    /// # Errors
    ///
    /// The communicator's.
    pub fn warm_up(comm: &Arc<dyn Communicator>, len: usize, device: Device) -> Result<(), FsepError> {
        match Self::start(comm, vec![Part::Zeros(len, device)])?.pending {
            Some(pending) => Ok(pending.wait()?),
            None => Ok(()),
        }
    }

    /// Waits for the mean: one row of all parts.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the gradients cannot be read, or the communicator's.
    pub fn wait(self) -> Result<Tensor<1>, FsepError> {
        let Self { flat, comm, pending } = self;
        if let Some(pending) = pending {
            pending.wait()?;
            return Ok(flat);
        }
        let (device, len) = (flat.device(), flat.dims()[0]);
        let data = flat.try_into_data().map_err(|error| FsepError::Device(error.to_string()))?;
        let mut values: Vec<f32> = data.iter::<f32>().collect();
        comm.all_reduce(OPERATION, ReduceBuffer::F32(&mut values), ReduceOp::Mean)?;
        Ok(Tensor::from_data(TensorData::new(values, [len]), (&device, DType::F32)))
    }
}

/// A row of its own: it will be overwritten.
fn flatten(parts: Vec<Part>) -> Tensor<1> {
    let mut rows: Vec<Tensor<1>> = parts.into_iter().map(Part::into_row).collect();
    if rows.len() == 1 {
        // The row of a single gradient could share the gradient's memory.
        rows.push(Tensor::zeros([1], (&rows[0].device(), DType::F32)));
    }
    Tensor::cat(rows, 0)
}

impl Part {
    fn into_row(self) -> Tensor<1> {
        match self {
            Part::Zeros(len, device) => Tensor::zeros([len], (&device, DType::F32)),
            Part::Gradient(gradient) => {
                let len = gradient.shape().num_elements();
                let row = Dispatch::float_reshape(gradient, Shape::new([len]));
                Tensor::from_dispatch(match row.dtype() {
                    DType::F32 => row,
                    _ => Dispatch::float_cast(row, FloatDType::F32),
                })
            }
        }
    }
}
