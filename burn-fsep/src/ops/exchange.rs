use std::sync::Arc;

use burn::{
    backend::{Backend, Dispatch as AnyBackend, backend_extension, tensor::FloatTensor},
    tensor::Tensor,
};

use super::FsepKernels;
use crate::{
    comm::{Block, Communicator, ExchangePlan, Operation},
    error::throw,
};

/// All-to-All-v of tensors without gradients, for every backend with [`FsepKernels`].
#[backend_extension(Cube: cfg(feature = "cube"), Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"))]
pub trait FsepExchange: Backend {
    /// Exchanges elements, which `plan` counts: on the device where the communicator reaches it, else through host memory.
    /// Collective. `[plan.send_len] -> [plan.recv_len]`
    ///
    /// # Panics
    ///
    /// If the tensor cannot be read or the communicator fails, with the typed error as payload;
    /// [`FsepRuntime::run`](crate::FsepRuntime::run) returns it.
    fn fsep_all_to_all(
        sent: FloatTensor<Self>,
        plan: ExchangePlan,
        comm: Arc<dyn Communicator>,
        operation: Operation,
    ) -> FloatTensor<Self>;
}

impl<B: FsepKernels> FsepExchange for B {
    fn fsep_all_to_all(
        sent: FloatTensor<Self>,
        plan: ExchangePlan,
        comm: Arc<dyn Communicator>,
        operation: Operation,
    ) -> FloatTensor<Self> {
        let received = B::fsep_start_exchange(sent, comm.as_ref(), operation, &plan);
        let received = received.and_then(|pending| pending.wait([plan.recv_len]));
        received.unwrap_or_else(|error| {
            comm.abort(&error.to_string());
            throw(error, comm.rank())
        })
    }
}

/// [`FsepExchange::fsep_all_to_all`] of a tensor of any backend. `[plan.send_len] -> [plan.recv_len]`
///
/// # Panics
///
/// As there.
pub fn all_to_all(
    sent: Tensor<1>,
    plan: ExchangePlan,
    comm: &Arc<dyn Communicator>,
    operation: Operation,
) -> Tensor<1> {
    let sent = sent.into_dispatch();
    Tensor::from_dispatch(<AnyBackend as FsepExchange>::fsep_all_to_all(sent, plan, comm.clone(), operation))
}

/// All ranks' tensors, of one length and type and not empty, one after the other in rank order. Collective. `[len] -> [N * len]`
///
/// # Panics
///
/// As [`all_to_all`].
pub fn all_gather(part: Tensor<1>, comm: &Arc<dyn Communicator>, operation: Operation) -> Tensor<1> {
    let (len, ranks) = (part.dims()[0], comm.size());
    let block = |peer, offset| Block { peer, offset, len };
    let plan = ExchangePlan {
        sends: (0..ranks).map(|peer| block(peer, 0)).collect(),
        recvs: (0..ranks).map(|peer| block(peer, peer * len)).collect(),
        recv_len: ranks * len,
        send_len: len,
    };
    all_to_all(part, plan, comm, operation)
}
