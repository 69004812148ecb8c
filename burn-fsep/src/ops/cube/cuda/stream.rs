//! The stream that CubeCL computes on.
//!
//! CubeCL's client shows no stream. Its server does: `DeviceHandle` runs a closure on the thread that owns it, behind all that was
//! queued, and `WriteScoped` gives its streams, which is how CubeCL's own collectives find theirs. What is queued there comes after
//! the kernels that were queued before and before those that will be, like a kernel of CubeCL's.

use burn::backend::CubeDevice;
use burn_cubecl::{
    cubecl::{
        cuda::CudaRuntime,
        device_handle::DeviceHandle,
        server::{ServerError, ServerStorage},
    },
    tensor::CubeTensor,
};
use burn_fusion::custom::StreamId;
use cubecl_server::{runtime::Runtime, stream::WriteScoped};
use cudarc::driver::sys::CUstream;

use crate::FsepError;

type Server = <CudaRuntime as Runtime>::Server;

/// Index of the GPU that the tensor is on, if that is one of CUDA's.
pub(super) fn gpu_of(device: &CubeDevice) -> Option<usize> {
    match device {
        CubeDevice::Cuda(device) => Some(device.index),
        _ => None,
    }
}

/// Calls `launch` with the stream that this thread's work is queued on and the addresses of the tensors' first elements. The GPU's
/// context is current there. What `launch` queues on the stream comes after all work that the tensors' elements depend on, and the
/// tensors' memory is reused only by what comes after it.
///
/// `launch` runs on the thread that serves all ranks with this GPU, so it must wait for nobody.
///
/// # Errors
///
/// [`FsepError::Device`] if the tensors are on no GPU of CUDA's or a kernel that should have filled one failed; those of `launch`.
pub(super) fn on_stream<T: Send>(
    tensors: &[&CubeTensor],
    launch: impl FnOnce(CUstream, &[u64]) -> Result<T, FsepError> + Send,
) -> Result<T, FsepError> {
    let Some(first) = tensors.iter().find(|tensor| gpu_of(&tensor.device).is_some()) else {
        return Err(FsepError::Device("none of the tensors is on a GPU of CUDA's".into()));
    };
    let service = first.client.service_id();
    if tensors.iter().any(|tensor| tensor.client.service_id() != service) {
        return Err(FsepError::Device("tensors are on several devices".into()));
    }
    let bindings: Vec<_> = tensors.iter().map(|tensor| tensor.handle.clone().binding()).collect();
    let run = move |server: &mut Server| {
        let stream_id = StreamId::current();
        let mut addresses = Vec::with_capacity(bindings.len());
        for binding in &bindings {
            let resource = server.get_resource(binding.clone(), stream_id).map_err(server_error)?;
            addresses.push(resource.resource().ptr);
        }
        // Lets the stream wait for those that fill the tensors; dropped after the launch, it keeps their memory until that is done.
        let mut streams = server.write_streams().resolve(stream_id, bindings.iter()).map_err(server_error)?;
        let stream = streams.current().sys;
        launch(stream, &addresses)
    };
    DeviceHandle::<Server>::new(service.device)
        .submit_blocking(run)
        .unwrap_or_else(|error| Err(FsepError::Device(format!("CubeCL's thread failed: {error:?}"))))
}

fn server_error(error: ServerError) -> FsepError {
    FsepError::Device(error.to_string())
}
