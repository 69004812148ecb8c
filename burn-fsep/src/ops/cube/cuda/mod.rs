//! Burn's CUDA backend: what CubeCL has no equal of runs on its own streams, beside its kernels.
//!
//! The experts' products are cuBLAS's, which is loaded at run time ([`blas`]); where it is missing, the default bodies serve. All-to-Alls
//! are NCCL's on the tensors' memory ([`exchange`]). Both are queued on the stream of CubeCL's that the calling thread computes on
//! ([`stream`]), so nothing has to be ordered by events of the whole context, and the host waits for nothing.

mod blas;
#[cfg(feature = "nccl")]
mod exchange;
pub(super) mod experts;
mod stream;
#[cfg(all(test, feature = "flex"))]
mod tests;

#[cfg(feature = "nccl")]
pub(super) use exchange::start_exchange;
