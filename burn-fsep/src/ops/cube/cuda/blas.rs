//! cuBLAS on CubeCL's memory.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    ptr,
    sync::{Arc, LazyLock},
};

use burn::tensor::DType;
use cudarc::{
    cublas::{
        result::{self, CublasError},
        sys::{self, cublasComputeType_t, cublasGemmAlgo_t, cublasHandle_t, cublasOperation_t, cudaDataType},
    },
    driver::{
        DriverError,
        result::{event, stream},
        sys::{CUevent, CUevent_flags, CUevent_wait_flags, CUstream},
    },
};
use parking_lot::Mutex;

use crate::FsepError;

/// Whether cuBLAS can be loaded; cudarc panics where it cannot.
// SAFETY: these only ask whether the library can be loaded.
static IS_PRESENT: LazyLock<bool> = LazyLock::new(|| unsafe { sys::is_culib_present() });

/// Whether there is cuBLAS for products of this type.
pub(super) fn computes(dtype: DType) -> bool {
    data_type(dtype).is_some() && *IS_PRESENT
}

fn data_type(dtype: DType) -> Option<cudaDataType> {
    match dtype {
        DType::F32 => Some(cudaDataType::CUDA_R_32F),
        DType::F16 => Some(cudaDataType::CUDA_R_16F),
        DType::BF16 => Some(cudaDataType::CUDA_R_16BF),
        _ => None,
    }
}

/// A matrix in row-major order: its address, rows and columns, and the distance of its rows in elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    pub address: u64,
    pub rows: usize,
    pub columns: usize,
    pub stride: usize,
}

/// `output = left * right`, either transposed or not, or `output += ..`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub left: Matrix,
    pub transpose_left: bool,
    pub right: Matrix,
    pub transpose_right: bool,
    pub output: Matrix,
    pub accumulate: bool,
}

/// Streams that share the products of a group: those of one fine-grained expert fill a part of a GPU only. A whole layer on an H200
/// in bf16: 9.19 ms, on one stream 9.65 (8192 tokens, D = 2048, F = 1408, 64 experts, top-6); 14.97 ms, on one stream 15.22 (16384,
/// 2048, 1024, 64, 8). `cublasGemmGroupedBatchedEx` is slower than one stream: 10.61 ms where that took 7.76 (the first shape, with
/// autotuned products of the router).
const STREAMS: usize = 4;

/// A product with fewer rows does not fill a GPU, so several run at once.
const FILLED_FROM: usize = 1024;

/// cuBLAS for one stream of CubeCL's, and streams beside it. Used under a lock, on the thread that serves the GPU.
struct Blas {
    handle: Handle,
    beside: Vec<Beside>,
    forked: CUevent,
}

/// A stream of our own.
struct Beside {
    handle: Handle,
    stream: CUstream,
    done: CUevent,
}

struct Handle(cublasHandle_t);

// SAFETY: handles, streams and events of CUDA may be used from any thread, one at a time, which `STREAMS_OF` sees to.
unsafe impl Send for Blas {}

/// By GPU and stream of CubeCL's.
type BlasOfStreams = BTreeMap<(usize, u64), Arc<Mutex<Blas>>>;

/// A memory of what was made once; streams of CubeCL's live as long as the process.
static BLAS: Mutex<BlasOfStreams> = Mutex::new(BTreeMap::new());

impl Blas {
    fn of(gpu: usize, stream: CUstream) -> Result<Arc<Mutex<Self>>, FsepError> {
        let key = (gpu, stream as u64);
        let mut all = BLAS.lock();
        if let Some(blas) = all.get(&key) {
            return Ok(blas.clone());
        }
        let blas = Arc::new(Mutex::new(Self {
            handle: Handle::new(stream)?,
            beside: Vec::new(),
            forked: new_event().map_err(driver_error)?,
        }));
        all.insert(key, blas.clone());
        Ok(blas)
    }

    fn fork(&mut self, compute: CUstream) -> Result<(), FsepError> {
        while self.beside.len() + 1 < STREAMS {
            let stream = stream::create(stream::StreamKind::NonBlocking).map_err(driver_error)?;
            self.beside.push(Beside { handle: Handle::new(stream)?, stream, done: new_event().map_err(driver_error)? });
        }
        let fork = || -> Result<(), DriverError> {
            // SAFETY: the events and streams are alive and of the current context.
            unsafe {
                event::record(self.forked, compute)?;
                self.beside.iter().try_for_each(|beside| wait(beside.stream, self.forked))
            }
        };
        fork().map_err(driver_error)
    }

    fn join(&self, compute: CUstream) -> Result<(), FsepError> {
        let join = || -> Result<(), DriverError> {
            self.beside.iter().try_for_each(|beside| {
                // SAFETY: as in `fork`.
                unsafe {
                    event::record(beside.done, beside.stream)?;
                    wait(compute, beside.done)
                }
            })
        };
        join().map_err(driver_error)
    }
}

/// # Safety
///
/// Both are alive and of one context, which is current.
unsafe fn wait(stream: CUstream, event: CUevent) -> Result<(), DriverError> {
    // SAFETY: the caller's.
    unsafe { stream::wait_event(stream, event, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
}

fn new_event() -> Result<CUevent, DriverError> {
    event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)
}

impl Handle {
    fn new(stream: CUstream) -> Result<Self, FsepError> {
        let handle = Self(result::create_handle().map_err(blas_error)?);
        // SAFETY: both are alive.
        unsafe { result::set_stream(handle.0, stream.cast()) }.map_err(blas_error)?;
        Ok(handle)
    }

    /// # Safety
    ///
    /// The matrices are memory of the GPU, of elements of this type, and the output overlaps with no other.
    unsafe fn multiply(&self, product: &Product, dtype: cudaDataType) -> Result<(), CublasError> {
        let Product { left, transpose_left, right, transpose_right, output, accumulate } = product;
        let inner = if *transpose_left { left.rows } else { left.columns };
        let operation = |transpose| {
            if transpose { cublasOperation_t::CUBLAS_OP_T } else { cublasOperation_t::CUBLAS_OP_N }
        };
        let (one, beta) = (1f32, f32::from(u8::from(*accumulate)));
        let int = |number: usize| number as i32;
        // cuBLAS takes matrices by columns, where these are transposed: so it computes `output^T = right^T * left^T`.
        // SAFETY: the caller's; the sizes are those of the matrices.
        unsafe {
            result::gemm_ex(
                self.0,
                operation(*transpose_right),
                operation(*transpose_left),
                int(output.columns),
                int(output.rows),
                int(inner),
                ptr::from_ref(&one).cast(),
                right.address as *const c_void,
                dtype,
                int(right.stride),
                left.address as *const c_void,
                dtype,
                int(left.stride),
                ptr::from_ref(&beta).cast(),
                output.address as *mut c_void,
                dtype,
                int(output.stride),
                // Sums in single precision, of f32 without TF32.
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
    }
}

/// Queues products that do not depend on each other on a stream of CubeCL's.
///
/// # Errors
///
/// [`FsepError::Device`] if cuBLAS or the driver refuses one.
///
/// # Safety
///
/// The GPU's context is current, [`computes`] says yes, and the matrices are memory of that GPU of elements of `dtype`; no output
/// overlaps with another matrix of the group.
pub(super) unsafe fn multiply(
    gpu: usize,
    compute: CUstream,
    products: &[Product],
    dtype: DType,
) -> Result<(), FsepError> {
    let Some(dtype) = data_type(dtype) else {
        return Err(FsepError::Device(format!("cuBLAS has no products of {dtype:?} here")));
    };
    if products.is_empty() {
        return Ok(());
    }
    let blas = Blas::of(gpu, compute)?;
    let mut blas = blas.lock();
    let rows = products.iter().map(|product| product.rows_of_tokens()).sum::<usize>();
    let is_shared = products.len() > 1 && rows <= FILLED_FROM * products.len();
    if is_shared {
        blas.fork(compute)?;
    }
    let queue = || {
        products.iter().enumerate().try_for_each(|(i, product)| {
            let handle = match i % STREAMS {
                place if is_shared && place > 0 => &blas.beside[place - 1].handle,
                _ => &blas.handle,
            };
            // SAFETY: the caller's.
            unsafe { handle.multiply(product, dtype) }
        })
    };
    let queued = queue().map_err(blas_error);
    if is_shared {
        // Also of a group that failed something may be queued.
        blas.join(compute)?;
    }
    queued
}

impl Product {
    /// The number of rows that belong to tokens: of the output, or what is summed over in a gradient of weights.
    fn rows_of_tokens(&self) -> usize {
        if self.transpose_left { self.left.rows } else { self.output.rows }
    }
}

fn blas_error(error: CublasError) -> FsepError {
    FsepError::Device(format!("cuBLAS: {error:?}"))
}

pub(super) fn driver_error(error: DriverError) -> FsepError {
    FsepError::Device(error.to_string())
}
