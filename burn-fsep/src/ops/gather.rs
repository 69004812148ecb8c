use std::sync::Arc;

use burn::{
    backend::{Backend, Dispatch as AnyBackend, TensorMetadata, backend_extension, tensor::FloatTensor},
    tensor::Tensor,
};

use super::FsepKernels;
use crate::{
    comm::{Block, Communicator, ExchangePlan, Operation},
    error::throw,
};

/// All-gather of tensors without gradients, for every backend with [`FsepKernels`].
#[backend_extension(Cube: cfg(feature = "cube"), Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"))]
pub trait FsepGather: Backend {
    /// All ranks' tensors, of one length and type and not empty, one after the other in rank order: on the device where the
    /// communicator reaches it, else through host memory. Collective. `[len] -> [N * len]`
    ///
    /// # Panics
    ///
    /// If the tensor cannot be read or the communicator fails, with the typed error as payload;
    /// [`FsepRuntime::run`](crate::FsepRuntime::run) returns it.
    fn fsep_all_gather(part: FloatTensor<Self>, comm: Arc<dyn Communicator>, operation: Operation)
    -> FloatTensor<Self>;
}

impl<B: FsepKernels> FsepGather for B {
    fn fsep_all_gather(
        part: FloatTensor<Self>,
        comm: Arc<dyn Communicator>,
        operation: Operation,
    ) -> FloatTensor<Self> {
        let (len, ranks) = (part.shape().num_elements(), comm.size());
        let block = |peer, offset| Block { peer, offset, len };
        let plan = ExchangePlan {
            sends: (0..ranks).map(|peer| block(peer, 0)).collect(),
            recvs: (0..ranks).map(|peer| block(peer, peer * len)).collect(),
            recv_len: ranks * len,
            send_len: len,
        };
        let gathered = B::fsep_start_exchange(part, comm.as_ref(), operation, &plan);
        let gathered = gathered.and_then(|pending| pending.wait([ranks * len]));
        gathered.unwrap_or_else(|error| {
            comm.abort(&error.to_string());
            throw(error, comm.rank())
        })
    }
}

/// [`FsepGather::fsep_all_gather`] of a tensor of any backend. `[len] -> [N * len]`
///
/// # Panics
///
/// As there.
pub fn all_gather(part: Tensor<1>, comm: &Arc<dyn Communicator>, operation: Operation) -> Tensor<1> {
    Tensor::from_dispatch(<AnyBackend as FsepGather>::fsep_all_gather(part.into_dispatch(), comm.clone(), operation))
}
