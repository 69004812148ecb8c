use std::{collections::BTreeMap, sync::Arc};

use burn::tensor::FloatDType;
use burn_fsep_planner::Layout;
use cudarc::{
    driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, LaunchArgs, LaunchConfig, PushKernelArg},
    nvrtc::{CompileOptions, compile_ptx_with_opts},
};
use parking_lot::Mutex;
use tch::{Device, Kind, TchError, Tensor};

use super::super::ExpertActivation;

/// The kernels of `kernels.cu`, compiled for one GPU.
#[derive(Debug)]
pub(super) struct Fused {
    /// The legacy default stream, on which LibTorch computes.
    stream: Arc<CudaStream>,
    /// By [`number_of`] an activation: forward and backward.
    activations: Vec<[CudaFunction; 2]>,
    top_k: CudaFunction,
    combine: CudaFunction,
    combine_backward: CudaFunction,
    sum_replicas: CudaFunction,
    /// Major number of the compute capability.
    generation: i32,
}

/// Kernels compiled in this process, by GPU; `None` where they cannot be. Like cuBLAS's handles in LibTorch: a memory of
/// what was made once, without any meaning of its own.
static COMPILED: Mutex<BTreeMap<usize, Option<Arc<Fused>>>> = Mutex::new(BTreeMap::new());

/// The activations' kernels, by [`number_of`].
const ACTIVATIONS: [&str; 5] = ["swiglu", "clamped_swiglu", "geglu", "gelu", "relu_squared"];

/// The number of an activation, and its two constants.
fn number_of(activation: ExpertActivation) -> (usize, f32, f32) {
    match activation {
        ExpertActivation::SwiGlu => (0, 0.0, 0.0),
        ExpertActivation::ClampedSwiGlu { alpha, limit } => (1, alpha as f32, limit as f32),
        ExpertActivation::Geglu => (2, 0.0, 0.0),
        ExpertActivation::Gelu => (3, 0.0, 0.0),
        ExpertActivation::ReluSquared => (4, 0.0, 0.0),
    }
}

/// Elements that a thread handles at a time.
const VECTOR: i64 = 8;

fn on_gpu(index: usize) -> Option<Arc<Fused>> {
    // Without NVRTC or a fitting driver LibTorch's own operations do the work.
    COMPILED.lock().entry(index).or_insert_with(|| Fused::compile(index).ok().map(Arc::new)).clone()
}

/// Whether LibTorch computes the products of all slots in one launch well.
pub(super) fn has_grouped_products(device: Device) -> bool {
    matches!(device, Device::Cuda(index) if on_gpu(index).is_some_and(|gpu| gpu.generation >= 9))
}

/// A module of kernels on one GPU.
pub(super) struct Compiled {
    pub context: Arc<CudaContext>,
    pub module: Arc<CudaModule>,
}

/// Compiles kernels for a GPU.
pub(super) fn compile(index: usize, source: &str) -> Result<Compiled, Box<dyn std::error::Error>> {
    // cudarc panics where the driver or NVRTC is not installed.
    // SAFETY: these only ask whether the libraries can be loaded.
    if !unsafe { cudarc::driver::sys::is_culib_present() && cudarc::nvrtc::sys::is_culib_present() } {
        return Err("the CUDA driver or NVRTC is not installed".into());
    }
    let context = CudaContext::new(index)?;
    let (major, minor) = context.compute_capability()?;
    let architecture = format!("--gpu-architecture=compute_{major}{minor}");
    let options = CompileOptions { options: vec![architecture], ..Default::default() };
    let module = context.load_module(compile_ptx_with_opts(source, options)?)?;
    Ok(Compiled { context, module })
}

impl Fused {
    /// The kernels for a tensor with rows of `width` elements; `None` where they do not apply.
    pub fn of(tensor: &Tensor, width: i64) -> Option<Arc<Self>> {
        let Device::Cuda(index) = tensor.device() else { return None };
        // A view may begin anywhere, but a vector has to be aligned.
        let is_aligned = (tensor.data_ptr() as usize).is_multiple_of(2 * VECTOR as usize);
        let fits = tensor.kind() == Kind::BFloat16 && width % VECTOR == 0 && tensor.is_contiguous() && is_aligned;
        if fits { on_gpu(index) } else { None }
    }

    fn compile(index: usize) -> Result<Self, Box<dyn std::error::Error>> {
        let Compiled { context, module } = compile(index, include_str!("kernels.cu"))?;
        let (major, _) = context.compute_capability()?;
        Ok(Self {
            stream: context.default_stream(),
            activations: ACTIVATIONS
                .iter()
                .map(|name| Ok([module.load_function(name)?, module.load_function(&format!("{name}_backward"))?]))
                .collect::<Result<_, DriverError>>()?,
            top_k: module.load_function("top_k")?,
            combine: module.load_function("combine")?,
            combine_backward: module.load_function("combine_backward")?,
            sum_replicas: module.load_function("sum_replicas")?,
            generation: major,
        })
    }

    /// The activation of gate, if there is one, and up, side by side. `[M, 2F or F] -> [M, F]`
    pub fn activate(&self, activation: ExpertActivation, first: &Tensor, ffn: i64) -> Result<Tensor, TchError> {
        let rows = first.size()[0];
        let hidden = Tensor::f_empty([rows, ffn], (first.kind(), first.device()))?;
        let (number, alpha, limit) = number_of(activation);
        let (pointers, width) = ([address(first), address(&hidden)], groups(ffn));
        self.launch(&self.activations[number][0], rows, width, |args| {
            args.arg(&pointers[0]).arg(&pointers[1]).arg(&width).arg(&alpha).arg(&limit);
        })?;
        Ok(hidden)
    }

    /// `([M, 2F or F], [M, F]) -> ([M, 2F or F], [M, F])`: gradient of the input, and the output once more.
    pub fn activate_backward(
        &self,
        activation: ExpertActivation,
        first: &Tensor,
        grad: &Tensor,
    ) -> Result<(Tensor, Tensor), TchError> {
        let [rows, ffn] = [grad.size()[0], grad.size()[1]];
        let grad = grad.f_contiguous()?;
        let (d_first, hidden) = (first.f_empty_like()?, grad.f_empty_like()?);
        let (number, alpha, limit) = number_of(activation);
        let pointers = [first, &grad, &d_first, &hidden].map(address);
        let width = groups(ffn);
        self.launch(&self.activations[number][1], rows, width, |args| {
            pointers.iter().for_each(|pointer| _ = args.arg(pointer));
            args.arg(&width).arg(&alpha).arg(&limit);
        })?;
        Ok((d_first, hidden))
    }

    /// As [`FsepDeviceOps::fsep_top_k`](super::super::FsepDeviceOps::fsep_top_k); `None` where the kernel does not apply.
    pub fn top_k(numbers: &Tensor, topk: usize) -> Result<Option<Tensor>, TchError> {
        /// Rows of a block; their numbers are in its shared memory.
        const ROWS: u32 = 4;
        const MAX_WIDTH: i64 = 2048;
        let Device::Cuda(index) = numbers.device() else { return Ok(None) };
        let [rows, width] = [numbers.size()[0], numbers.size()[1]];
        let fits = numbers.kind() == Kind::Float && numbers.is_contiguous() && (1..=MAX_WIDTH).contains(&width);
        let Some(gpu) = on_gpu(index).filter(|_| fits && topk as i64 <= width) else { return Ok(None) };
        let chosen = Tensor::f_empty([rows, topk as i64], (Kind::Int64, numbers.device()))?;
        if rows == 0 {
            return Ok(Some(chosen));
        }
        let config = LaunchConfig {
            grid_dim: ((rows as u32).div_ceil(ROWS), 1, 1),
            block_dim: (32 * ROWS, 1, 1),
            shared_mem_bytes: 4 * ROWS * width as u32,
        };
        let (pointers, sizes) = ([address(numbers), address(&chosen)], [rows as i32, width as i32, topk as i32]);
        let mut args = gpu.stream.launch_builder(&gpu.top_k);
        pointers.iter().for_each(|pointer| _ = args.arg(pointer));
        sizes.iter().for_each(|size| _ = args.arg(size));
        // SAFETY: the pointers are to `rows * width` numbers of single precision and to `rows * topk` long integers, both
        // contiguous, and `topk` is at most `width`, so that each turn finds a number that was not taken. A block's rows fit
        // into the shared memory that is asked for. As to the tensors' lives, see `launch`.
        unsafe { args.launch(config) }.map_err(|error| TchError::Torch(error.to_string()))?;
        Ok(Some(chosen))
    }

    /// `([R, D], [T * K], [T, K]) -> [T, D]`: rows of each token summed, weighted if there are probabilities. An index below 0 is
    /// none.
    ///
    /// # Safety
    ///
    /// Indices are less than `R`.
    pub unsafe fn combine(
        &self,
        rows: &Tensor,
        row_of: &Tensor,
        probs: Option<&Tensor>,
        topk: i64,
    ) -> Result<Tensor, TchError> {
        let (tokens, hidden) = (row_of.size()[0] / topk, rows.size()[1]);
        let row_of = row_of.f_to_kind(Kind::Int64)?.f_contiguous()?;
        let probs = probs.map(|probs| probs.f_to_kind(Kind::BFloat16)?.f_contiguous()).transpose()?;
        let out = Tensor::f_empty([tokens, hidden], (rows.kind(), rows.device()))?;
        let pointers = [address(rows), address(&row_of), probs.as_ref().map_or(0, address), address(&out)];
        let (topk, width) = (topk as i32, groups(hidden));
        self.launch(&self.combine, tokens, width, |args| {
            pointers.iter().for_each(|pointer| _ = args.arg(pointer));
            args.arg(&topk).arg(&width);
        })?;
        Ok(out)
    }

    /// Gradients of the `R` rows, `[R, D]`, if wanted, and of the probabilities, `[T, K]`, if rows are given. Without
    /// probabilities they are 1. An index below 0 is none; a row that none names is left as it is in memory.
    ///
    /// # Safety
    ///
    /// Indices are less than `R`.
    pub unsafe fn combine_backward(
        &self,
        grad: &Tensor,
        rows: Option<&Tensor>,
        row_of: &Tensor,
        probs: Option<&Tensor>,
        [num_rows, topk]: [i64; 2],
        want_rows: bool,
    ) -> Result<(Option<Tensor>, Option<Tensor>), TchError> {
        let (tokens, hidden) = (grad.size()[0], grad.size()[1]);
        let row_of = row_of.f_to_kind(Kind::Int64)?.f_contiguous()?;
        let probs = probs.map(|probs| probs.f_to_kind(Kind::BFloat16)?.f_contiguous()).transpose()?;
        let options = (grad.kind(), grad.device());
        let d_rows = want_rows.then(|| Tensor::f_empty([num_rows, hidden], options)).transpose()?;
        let d_probs = rows.map(|_| Tensor::f_empty([tokens, topk], options)).transpose()?;
        let optional = |tensor: Option<&Tensor>| tensor.map_or(0, address);
        let pointers = [
            address(grad),
            optional(rows),
            address(&row_of),
            optional(probs.as_ref()),
            optional(d_rows.as_ref()),
            optional(d_probs.as_ref()),
        ];
        let (topk, width) = (topk as i32, groups(hidden));
        self.launch(&self.combine_backward, tokens, width, |args| {
            pointers.iter().for_each(|pointer| _ = args.arg(pointer));
            args.arg(&topk).arg(&width);
        })?;
        Ok((d_rows, d_probs))
    }

    /// Slot gradients summed over replicas, `[N * C * S] -> [E, S]`; `None` where the kernel does not apply.
    pub fn sum_replicas(
        received: &Tensor,
        layout: &Layout,
        shard_len: usize,
        scale: f64,
        to: FloatDType,
    ) -> Result<Option<Tensor>, TchError> {
        let Device::Cuda(index) = received.device() else { return Ok(None) };
        let half = |kind: Kind| match kind {
            Kind::BFloat16 => Some(1i32),
            Kind::Float => Some(0),
            _ => None,
        };
        let to = match to {
            FloatDType::BF16 => Kind::BFloat16,
            FloatDType::F32 => Kind::Float,
            _ => return Ok(None),
        };
        let (Some(is_half), Some(to_half), Some(gpu)) = (half(received.kind()), half(to), on_gpu(index)) else {
            return Ok(None);
        };
        if received.numel() != layout.as_slice().len() * shard_len || !received.is_contiguous() {
            return Ok(None);
        }
        let experts = layout.num_experts();
        let mut rows_of: Vec<Vec<i32>> = vec![Vec::new(); experts];
        for (row, &expert) in layout.as_slice().iter().enumerate() {
            rows_of[expert as usize].push(row as i32);
        }
        let mut plan = vec![0i32];
        for rows in &rows_of {
            plan.push(plan[plan.len() - 1] + rows.len() as i32);
        }
        plan.extend(rows_of.concat());
        let plan = upload(&plan, received.device())?;
        let sums = Tensor::f_empty([experts as i64, shard_len as i64], (to, received.device()))?;
        let starts = address(&plan);
        let pointers = [address(received), address(&sums), starts, starts + 4 * (experts as u64 + 1)];
        let (len, scale) = (shard_len as i64, scale as f32);
        let config = LaunchConfig {
            grid_dim: ((shard_len as u32).div_ceil(256), experts as u32, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut args = gpu.stream.launch_builder(&gpu.sum_replicas);
        pointers.iter().for_each(|pointer| _ = args.arg(pointer));
        args.arg(&len).arg(&scale).arg(&is_half).arg(&to_half);
        // SAFETY: the pointers are to `N * C * S` received elements of the type that `is_half` says, to `E * S` of that of
        // `to_half`, and to the experts' starts and rows, which are rows of the received ones. As to their lives, see
        // `launch`.
        unsafe { args.launch(config) }.map_err(|error| TchError::Torch(error.to_string()))?;
        Ok(Some(sums))
    }

    /// Launches one block a row, if there is any.
    fn launch<'a>(
        &'a self,
        kernel: &'a CudaFunction,
        rows: i64,
        width: i32,
        push: impl FnOnce(&mut LaunchArgs<'a>),
    ) -> Result<(), TchError> {
        if rows == 0 {
            return Ok(());
        }
        let threads = (width as u32).next_multiple_of(32).min(256);
        let config = LaunchConfig { grid_dim: (rows as u32, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        let mut args = self.stream.launch_builder(kernel);
        push(&mut args);
        // SAFETY: the callers pass what the kernels of kernels.cu take: pointers to contiguous tensors of the sizes that
        // the kernels compute from rows, width and top-k. The tensors may be freed when the launch returns: LibTorch
        // reuses their memory in the order of the same stream.
        unsafe { args.launch(config) }.map(drop).map_err(|error| TchError::Torch(error.to_string()))
    }
}

/// A few numbers on a device, without a wait for what the device is doing: CUDA sets them aside before the call returns.
pub(super) fn upload(numbers: &[i32], device: Device) -> Result<Tensor, TchError> {
    const NON_BLOCKING: bool = true;
    Tensor::f_from_slice(numbers)?.f_internal_to_copy((Kind::Int, device), NON_BLOCKING)
}

/// The address of a contiguous tensor's first element.
fn address(tensor: &Tensor) -> u64 {
    tensor.data_ptr() as u64
}

/// Groups of elements in a row.
fn groups(width: i64) -> i32 {
    (width / VECTOR) as i32
}
