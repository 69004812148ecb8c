use burn::tensor::Device;
#[cfg(any(feature = "cuda", feature = "metal", feature = "rocm", feature = "vulkan", feature = "webgpu"))]
use burn::tensor::DeviceType;
use burn_fsep::launch::RankDevice;
use clap::ValueEnum;

use crate::DeviceArg;

/// What computes.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Burn's CPU backend.
    Flex,
    /// LibTorch, on CPU and NVIDIA GPUs.
    Libtorch,
    /// Burn's own GPU backend on Vulkan; ranks take the machine's GPUs in turns.
    Vulkan,
    /// The same on what the machine has (Vulkan, Metal or DirectX), by shaders of WebGPU.
    Webgpu,
    /// The same on CUDA.
    Cuda,
    /// The same on ROCm.
    Rocm,
    /// The same on Metal.
    Metal,
}

impl Backend {
    /// Burn's own GPU backends: the option, the feature that it needs, and whether this program has it.
    pub(crate) fn own(self) -> Option<(&'static str, &'static str, bool)> {
        Some(match self {
            Backend::Flex | Backend::Libtorch => return None,
            Backend::Vulkan => ("--backend vulkan", "vulkan", cfg!(feature = "vulkan")),
            Backend::Webgpu => ("--backend webgpu", "webgpu", cfg!(feature = "webgpu")),
            Backend::Cuda => ("--backend cuda", "cuda", cfg!(feature = "cuda")),
            Backend::Rocm => ("--backend rocm", "rocm", cfg!(feature = "rocm")),
            Backend::Metal => ("--backend metal", "metal", cfg!(feature = "metal")),
        })
    }

    /// What ranks compute on; a backend that was not built has been refused before.
    pub(crate) fn rank_device(self, device: DeviceArg) -> RankDevice {
        match (self, device) {
            #[cfg(feature = "libtorch")]
            (Backend::Libtorch, DeviceArg::Cpu) => RankDevice::Given(Device::libtorch()),
            #[cfg(feature = "libtorch")]
            (Backend::Libtorch, DeviceArg::CudaAt(index)) => RankDevice::Given(Device::libtorch_cuda(index)),
            #[cfg(feature = "vulkan")]
            (Backend::Vulkan, _) => RankDevice::Kind(DeviceType::Vulkan),
            // Burn's own name of it is that of browsers.
            #[cfg(feature = "webgpu")]
            (Backend::Webgpu, _) => RankDevice::Kind(DeviceType::Wgpu),
            #[cfg(feature = "cuda")]
            (Backend::Cuda, _) => RankDevice::Kind(DeviceType::Cuda),
            #[cfg(feature = "rocm")]
            (Backend::Rocm, _) => RankDevice::Kind(DeviceType::Rocm),
            #[cfg(feature = "metal")]
            (Backend::Metal, _) => RankDevice::Kind(DeviceType::Metal),
            (_, DeviceArg::Cuda) => RankDevice::Gpu,
            _ => RankDevice::Given(Device::flex()),
        }
    }
}
