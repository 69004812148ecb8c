//! The backends of GPU benches, as options of their commands.

use std::fmt;

use burn::tensor::{Device, FloatDType, IntDType};
use clap::ValueEnum;

/// What a bench runs on; each needs the feature of its name.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GpuBackend {
    /// Burn's LibTorch backend.
    #[default]
    Libtorch,
    /// Burn's own backend, by CUDA.
    Cuda,
    /// Burn's own backend, by Vulkan.
    Vulkan,
}

/// Types of parameters and tokens.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HalfPrecision {
    /// bf16.
    #[default]
    Bf16,
    /// f16.
    F16,
}

impl GpuBackend {
    /// The first GPU, whose tensors are of this type unless they say otherwise. Before anything was computed there.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub fn device(self, dtype: HalfPrecision) -> Result<Device, String> {
        let (mut device, ints) = match self {
            #[cfg(feature = "libtorch")]
            Self::Libtorch if !tch::Cuda::is_available() => {
                return Err("LibTorch sees no GPU; see the README for how to build with CUDA".into());
            }
            #[cfg(feature = "libtorch")]
            Self::Libtorch => (Device::libtorch_cuda(0), IntDType::I64),
            #[cfg(feature = "cuda")]
            Self::Cuda => (Device::cuda(0), IntDType::I32),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => (Device::vulkan(burn::tensor::DeviceKind::DiscreteGpu(0)), IntDType::I32),
            #[allow(unreachable_patterns)]
            other => return Err(format!("this program was built without the feature `{other}`")),
        };
        let floats = match dtype {
            HalfPrecision::Bf16 => FloatDType::BF16,
            HalfPrecision::F16 => FloatDType::F16,
        };
        if !device.supports_dtype(floats) {
            return Err(format!("the GPU does not compute in {dtype} by {self}"));
        }
        device.configure((floats, ints)).map_err(|error| error.to_string())?;
        Ok(device)
    }
}

impl fmt::Display for GpuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Libtorch => "libtorch",
            Self::Cuda => "cuda",
            Self::Vulkan => "vulkan",
        })
    }
}

impl fmt::Display for HalfPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}
