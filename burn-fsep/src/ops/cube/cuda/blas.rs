//! cuBLAS on CubeCL's memory.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    ptr,
    sync::{Arc, LazyLock, mpsc},
    thread,
};

use burn::tensor::DType;
use cudarc::{
    cublas::{
        result::{self, CublasError},
        sys::{self, cublasComputeType_t, cublasGemmAlgo_t, cublasHandle_t, cublasOperation_t, cudaDataType},
    },
    driver::{
        DriverError,
        result::{ctx, event, stream},
        sys::{CUcontext, CUevent, CUevent_flags, CUevent_wait_flags, CUstream},
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

/// Streams that share the products of a group, each with a thread that queues them: those of one fine-grained expert fill a part of a
/// GPU only, and cuBLAS takes the host as long to queue one as the GPU to compute it. `cublasGemmGroupedBatchedEx`, one call for all, is
/// slower than one stream on an H200: 10.61 ms for a layer that took 7.76 (bf16, 8192 tokens, D = 2048, F = 1408, 64 experts, top-6).
const STREAMS: usize = 4;

/// A product with fewer rows does not fill a GPU, so several run at once.
const FILLED_FROM: usize = 1024;

/// cuBLAS for one stream of CubeCL's, and streams beside it. Used under a lock, on the thread that serves the GPU.
struct Blas {
    handle: Handle,
    beside: Vec<Beside>,
    forked: CUevent,
}

/// A stream of our own, and the thread that queues products on it.
struct Beside {
    work: mpsc::Sender<Work>,
    queued: mpsc::Receiver<Result<(), CublasError>>,
    stream: CUstream,
    done: CUevent,
}

/// Products of matrices that keep what [`multiply`] promises until they are queued.
type Work = (Vec<Product>, cudaDataType);

/// A context of the driver's, for other threads.
struct Context(CUcontext);

// SAFETY: a context may be current on any number of threads.
unsafe impl Send for Context {}

struct Handle(cublasHandle_t);

// SAFETY: a handle may be used from any thread, one at a time, and whoever has it uses it alone.
unsafe impl Send for Handle {}

// SAFETY: handles, streams and events of CUDA may be used from any thread, one at a time, which the lock around it sees to.
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
            self.beside.push(Beside::new()?);
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

impl Beside {
    /// In the context that is current.
    fn new() -> Result<Self, FsepError> {
        let context = ctx::get_current().map_err(driver_error)?.ok_or_else(|| gone("no context is current"))?;
        let stream = stream::create(stream::StreamKind::NonBlocking).map_err(driver_error)?;
        let (handle, context) = (Handle::new(stream)?, Context(context));
        let (work, todo) = mpsc::channel::<Work>();
        let (report, queued) = mpsc::channel();
        let run = move || {
            let (handle, Context(context)) = (handle, { context });
            // SAFETY: the primary context lives as long as the process. Where it cannot be made current, cuBLAS says so.
            let _ = unsafe { ctx::set_current(context) };
            while let Ok((products, dtype)) = todo.recv() {
                // SAFETY: `multiply` waits for the report, until then what its caller promises holds.
                let queued = unsafe { handle.multiply_all(&products, dtype) };
                if report.send(queued).is_err() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("fsep-cublas".into()).spawn(run);
        thread.map_err(|error| FsepError::Device(format!("no thread for cuBLAS: {error}")))?;
        Ok(Self { work, queued, stream, done: new_event().map_err(driver_error)? })
    }
}

fn gone(reason: &str) -> FsepError {
    FsepError::Device(format!("cuBLAS: {reason}"))
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
    /// As [`Handle::multiply`].
    unsafe fn multiply_all<'a>(
        &self,
        products: impl IntoIterator<Item = &'a Product>,
        dtype: cudaDataType,
    ) -> Result<(), CublasError> {
        // SAFETY: the caller's.
        products.into_iter().try_for_each(|product| unsafe { self.multiply(product, dtype) })
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
    if products.len() == 1 || rows > FILLED_FROM * products.len() {
        // SAFETY: the caller's.
        return unsafe { blas.handle.multiply_all(products, dtype) }.map_err(blas_error);
    }
    blas.fork(compute)?;
    let share = |place: usize| products.iter().skip(place).step_by(STREAMS);
    let ended = || gone("a thread that queues products has ended");
    let mut queued = Ok(());
    for (i, beside) in blas.beside.iter().enumerate() {
        let sent = beside.work.send((share(i + 1).copied().collect(), dtype));
        queued = queued.and(sent.map_err(|_| ended()));
    }
    // SAFETY: the caller's.
    queued = queued.and(unsafe { blas.handle.multiply_all(share(0), dtype) }.map_err(blas_error));
    for beside in &blas.beside {
        // Waited for in any case: until then a thread may queue more.
        let reported = beside.queued.recv();
        queued = queued.and(reported.map_err(|_| ended()).and_then(|queued| queued.map_err(blas_error)));
    }
    // Also of a group that failed something may be queued.
    blas.join(compute)?;
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
