//! Burn's own GPU backends: one backend of CubeCL, whose tensors' devices say whether they are on Vulkan, WebGPU, CUDA, ROCm
//! or Metal, and that backend in Burn's wrapper that joins operations ([`Fusion`](burn_fusion::Fusion)).
//!
//! [`burn::backend::Cube`] is one of the two, as Burn's feature `fusion` says. Which one is decided by what else the program is
//! built with, so both have all operations.
//!
//! Fusion queues operations and runs them when something is read. It neither delays nor reorders a collective: collectives run
//! on the rank's own thread, between operations, and what they send is read from the device first, which runs what it is made
//! of. An operation of a layer is therefore never itself queued (`Fusion` is in no extension's list): run from the queue, on the
//! thread that all ranks with this device share, its collectives would wait for ranks that wait for that thread.

mod activation;
mod combine;
#[cfg(feature = "cuda")]
mod cuda;
mod device_ops;
mod fusion;
mod fusion_kernels;
mod kernels;
mod sort;
#[cfg(all(test, any(feature = "cuda", feature = "vulkan", feature = "webgpu")))]
mod tests;
mod top_k;

use burn_cubecl::{cubecl::ir::VectorSize, tensor::CubeTensor};

/// How many elements a unit reads and writes at once, so that rows of this width are whole numbers of them.
fn vector_size(tensor: &CubeTensor, width: usize) -> VectorSize {
    let sizes = tensor.client.io_optimized_vector_sizes(tensor.dtype.size());
    sizes.filter(|&size| width.is_multiple_of(size)).max().unwrap_or(1)
}
