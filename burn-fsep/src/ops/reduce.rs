//! All-reduce of tensors on their device, and what its users have to ask of a backend.

use std::sync::Arc;

use burn::{
    backend::{Backend, Dispatch, backend_extension, tensor::FloatTensor},
    tensor::Tensor,
};

use crate::{
    FsepError,
    comm::{Communicator, Operation, PendingDeviceExchange, ReduceOp},
};

/// All-reduce as an operation of a backend, by default through host memory, and the identity of tensors.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"))]
pub trait ReduceOps: Backend {
    /// Starts to replace the elements of `tensor`, in place, by their combination over ranks; `None` if the communicator
    /// does not reach tensors on their device. Nobody may use the tensor, or one that shares its memory, before the wait.
    ///
    /// # Errors
    ///
    /// The communicator's, and [`FsepError::Shape`] if the tensor is not contiguous or not of single precision.
    fn fsep_start_device_all_reduce(
        tensor: FloatTensor<Self>,
        comm: Arc<dyn Communicator>,
        operation: Operation,
        op: ReduceOp,
    ) -> Result<Option<Box<dyn PendingDeviceExchange>>, FsepError> {
        let _ = (tensor, comm, operation, op);
        Ok(None)
    }

    /// Whether two tensors are surely the same elements of the same memory. Experts that were prefetched are used only if their
    /// shards are the layer's by this, so a backend that cannot tell has no prefetch in forward.
    fn fsep_is_same(a: FloatTensor<Self>, b: FloatTensor<Self>) -> bool;
}

/// [`ReduceOps::fsep_is_same`] of tensors of any backend, without gradients.
pub(crate) fn is_same(a: &Tensor<2>, b: &Tensor<2>) -> bool {
    <Dispatch as ReduceOps>::fsep_is_same(a.clone().into_dispatch(), b.clone().into_dispatch())
}

#[cfg(feature = "flex")]
impl ReduceOps for burn::backend::Flex {
    fn fsep_is_same(a: FloatTensor<Self>, b: FloatTensor<Self>) -> bool {
        a.dtype() == b.dtype() && a.layout() == b.layout() && Arc::ptr_eq(&a.data_arc(), &b.data_arc())
    }
}
