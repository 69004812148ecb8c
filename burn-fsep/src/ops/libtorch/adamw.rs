use std::{collections::BTreeMap, sync::Arc};

use burn::{
    backend::LibTorch,
    tensor::{DType, Tensor},
};
use burn_tch::TchTensor;
use cudarc::driver::{CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use parking_lot::Mutex;
use tch::{Device, Kind, TchError};

use super::{cuda, kernels::device_error};
use crate::FsepError;

/// A step of AdamW, whose coefficients are equal for all elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamWStep {
    pub beta_1: f32,
    pub beta_2: f32,
    pub epsilon: f32,
    /// `1 - beta_1^time`
    pub correction_1: f32,
    /// `1 - beta_2^time`
    pub correction_2: f32,
    pub learning_rate: f32,
    /// Learning rate times weight decay.
    pub decay: f32,
    /// Decays only elements that the step makes smaller.
    pub cautious: bool,
}

/// A parameter with its gradient and moments; of one shape.
pub(crate) struct AdamWTensors<const D: usize> {
    pub parameter: Tensor<D>,
    pub gradient: Tensor<D>,
    pub moment_1: Tensor<D>,
    pub moment_2: Tensor<D>,
}

/// The kernels of `adamw.cu`, compiled for one GPU.
struct Kernels {
    /// The legacy default stream, on which LibTorch computes.
    stream: Arc<CudaStream>,
    f32: CudaFunction,
    bf16: CudaFunction,
    /// bf16 with moments in f32.
    bf16_f32: CudaFunction,
}

/// As [`cuda`]'s.
static COMPILED: Mutex<BTreeMap<usize, Option<Arc<Kernels>>>> = Mutex::new(BTreeMap::new());

impl Kernels {
    fn of(device: Device) -> Option<Arc<Self>> {
        let Device::Cuda(index) = device else { return None };
        COMPILED.lock().entry(index).or_insert_with(|| Self::compile(index).ok().map(Arc::new)).clone()
    }

    fn compile(index: usize) -> Result<Self, Box<dyn std::error::Error>> {
        let compiled = cuda::compile(index, concat!(include_str!("kernels.cu"), include_str!("adamw.cu")))?;
        let function = |name| compiled.module.load_function(name);
        Ok(Self {
            f32: function("adamw_f32")?,
            bf16: function("adamw_bf16")?,
            bf16_f32: function("adamw_bf16_f32")?,
            stream: compiled.context.default_stream(),
        })
    }

    fn get(&self, parameter: Kind, moments: Kind) -> Option<&CudaFunction> {
        match (parameter, moments) {
            (Kind::Float, Kind::Float) => Some(&self.f32),
            (Kind::BFloat16, Kind::BFloat16) => Some(&self.bf16),
            (Kind::BFloat16, Kind::Float) => Some(&self.bf16_f32),
            _ => None,
        }
    }
}

/// Whether one kernel can do a step of a parameter whose moments have this element type.
pub(crate) fn fuses_adamw<const D: usize>(parameter: &Tensor<D>, moments: DType) -> bool {
    let moments = match moments {
        DType::F32 => Kind::Float,
        DType::BF16 => Kind::BFloat16,
        _ => return false,
    };
    parameter.clone().try_into_primitive::<LibTorch>().is_ok_and(|parameter| {
        let parameter = parameter.tensor;
        Kernels::of(parameter.device()).is_some_and(|kernels| kernels.get(parameter.kind(), moments).is_some())
    })
}

/// A step in one kernel, where [`fuses_adamw`] says that there is one: the new parameter and moments, in the memory of the
/// old ones where nobody else uses it.
///
/// # Errors
///
/// [`FsepError::Device`] if there is no kernel, or it cannot be launched; [`FsepError::Shape`] for tensors of several
/// shapes or types.
pub(crate) fn fused_adamw<const D: usize>(
    tensors: AdamWTensors<D>,
    step: &AdamWStep,
) -> Result<[Tensor<D>; 3], FsepError> {
    let AdamWTensors { parameter, gradient, moment_1, moment_2 } = tensors;
    let primitive = |tensor: Tensor<D>| {
        let tensor = tensor.try_into_primitive::<LibTorch>();
        tensor.map_err(|error| FsepError::Device(format!("not a tensor of LibTorch: {error:?}")))
    };
    let [parameter, gradient, moment_1, moment_2] =
        [primitive(parameter)?, primitive(gradient)?, primitive(moment_1)?, primitive(moment_2)?];
    let signature = |tensor: &TchTensor| (tensor.tensor.size(), tensor.tensor.kind(), tensor.tensor.device());
    let check = |what: &str, actual: &TchTensor, expected: &TchTensor| {
        let (actual, expected) = (signature(actual), signature(expected));
        if actual == expected {
            return Ok(());
        }
        Err(FsepError::Shape {
            what: format!("{what} of a step of AdamW"),
            expected: format!("{expected:?}"),
            actual: format!("{actual:?}"),
        })
    };
    check("gradient", &gradient, &parameter)?;
    check("second moment", &moment_2, &moment_1)?;
    if moment_1.tensor.size() != parameter.tensor.size() || moment_1.tensor.device() != parameter.tensor.device() {
        check("first moment", &moment_1, &parameter)?;
    }
    let outputs = launch(parameter, gradient, moment_1, moment_2, step).map_err(device_error)?;
    Ok(outputs.map(Tensor::from_primitive::<LibTorch>))
}

fn launch(
    parameter: TchTensor,
    gradient: TchTensor,
    moment_1: TchTensor,
    moment_2: TchTensor,
    step: &AdamWStep,
) -> Result<[TchTensor; 3], TchError> {
    let error = |text: &str| TchError::Torch(text.into());
    let kernels =
        Kernels::of(parameter.tensor.device()).ok_or_else(|| error("AdamW has no kernels for this device"))?;
    let (parameter_kind, moments_kind) = (parameter.tensor.kind(), moment_1.tensor.kind());
    let kernel =
        kernels.get(parameter_kind, moments_kind).ok_or_else(|| error("AdamW has no kernel for these types"))?;
    let len = gradient.tensor.numel() as u64;
    let gradient = gradient.tensor.f_contiguous()?;
    let inputs = [contiguous(parameter)?, contiguous(moment_1)?, contiguous(moment_2)?];
    // Where somebody else uses an input's memory, the output gets its own.
    let mut outputs = Vec::with_capacity(3);
    for input in &inputs {
        let owned = if input.can_mut() { None } else { Some(TchTensor::new(input.tensor.f_empty_like()?)) };
        outputs.push(owned);
    }
    let address = |tensor: &tch::Tensor| tensor.data_ptr() as u64;
    let [p, m, v] = [0, 1, 2].map(|i| address(&inputs[i].tensor));
    let [new_p, new_m, new_v] =
        [0, 1, 2].map(|i| address(outputs[i].as_ref().map_or(&inputs[i].tensor, |output| &output.tensor)));
    let pointers = [p, address(&gradient), m, v, new_p, new_m, new_v];
    let aligned = i32::from(pointers.iter().all(|pointer| pointer % 16 == 0));
    let cautious = i32::from(step.cautious);
    if len > 0 {
        const THREADS: u32 = 256;
        const VECTOR: u64 = 8;
        // Enough to fill any GPU; the rest is a loop.
        let blocks = len.div_ceil(u64::from(THREADS) * VECTOR).min(1 << 14) as u32;
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let mut args = kernels.stream.launch_builder(kernel);
        pointers.iter().for_each(|pointer| _ = args.arg(pointer));
        args.arg(&len).arg(&step.beta_1).arg(&step.beta_2).arg(&step.epsilon);
        args.arg(&step.correction_1).arg(&step.correction_2).arg(&step.learning_rate).arg(&step.decay);
        args.arg(&cautious).arg(&aligned);
        // SAFETY: the arguments are those of adamw.cu: contiguous tensors of `len` elements of the kernel's types on this
        // GPU. An output is an input that nobody else uses, or memory of its own. The tensors may be freed when the launch
        // returns: LibTorch reuses their memory in the order of the same stream.
        unsafe { args.launch(config) }.map_err(|error| TchError::Torch(error.to_string()))?;
    }
    let [p, m, v] = inputs;
    let mut outputs = outputs.into_iter();
    Ok([p, m, v].map(|input| outputs.next().flatten().unwrap_or(input)))
}

/// The tensor, or a contiguous copy.
fn contiguous(tensor: TchTensor) -> Result<TchTensor, TchError> {
    if tensor.tensor.is_contiguous() {
        return Ok(tensor);
    }
    Ok(TchTensor::new(tensor.tensor.f_contiguous()?))
}
