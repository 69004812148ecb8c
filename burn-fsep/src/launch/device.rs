use burn::tensor::Device;

use super::LaunchError;

/// What ranks compute on.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum RankDevice {
    /// [`RankDevice::Gpu`] where this build has LibTorch and that sees a GPU, else [`RankDevice::Cpu`].
    #[default]
    Auto,
    /// The CPU: Flex, or LibTorch in a build without Flex.
    Cpu,
    /// The GPU of the rank's number on its machine: `LOCAL_RANK`, or the thread's number.
    Gpu,
    /// This device for all ranks: one GPU that they share, or another backend.
    Given(Device),
    /// The machine's devices of this kind, in turns by the rank's number on the machine: Vulkan, CUDA and Burn's other own GPU
    /// backends.
    #[cfg(feature = "cube")]
    Kind(burn::tensor::DeviceType),
}

impl RankDevice {
    /// The device of the rank with this number on its machine; `numbered` is what the number is called in messages.
    pub(super) fn of(&self, local_rank: usize, numbered: &str) -> Result<Device, LaunchError> {
        let count = gpu_count();
        match self {
            RankDevice::Auto if count == 0 => cpu(),
            RankDevice::Auto | RankDevice::Gpu => gpu(local_rank, count, numbered),
            RankDevice::Cpu => cpu(),
            #[cfg(feature = "cube")]
            RankDevice::Kind(kind) => {
                let devices = super::cube_devices::devices_of(kind)?;
                Ok(devices[local_rank % devices.len()].clone())
            }
            RankDevice::Given(device) => match gpu_of(device) {
                Some(index) if index >= count => Err(LaunchError::Device(match count {
                    0 => NO_GPU.into(),
                    count => format!("there is no GPU {index}: LibTorch sees {count}, numbered from 0"),
                })),
                _ => Ok(device.clone()),
            },
        }
    }

    /// Whether each rank has a GPU of its own.
    pub(super) fn is_own_gpu(&self) -> bool {
        matches!(self, RankDevice::Auto | RankDevice::Gpu) && gpu_count() > 0
    }
}

const NO_GPU: &str = if cfg!(feature = "libtorch") {
    "LibTorch sees no GPU: is the NVIDIA driver installed, was LibTorch set up with --cuda, and does CUDA_VISIBLE_DEVICES leave \
     one?"
} else {
    "this program was built without LibTorch (feature `libtorch` of burn-fsep), which GPUs need"
};

fn cpu() -> Result<Device, LaunchError> {
    #[cfg(feature = "flex")]
    return Ok(Device::flex());
    #[cfg(all(feature = "libtorch", not(feature = "flex")))]
    return Ok(Device::libtorch());
    #[cfg(not(any(feature = "flex", feature = "libtorch")))]
    Err(LaunchError::Device(
        "this program was built without burn-fsep's backends (features `flex` and `libtorch`): give a device of yours \
         (RankDevice::Given)"
            .into(),
    ))
}

fn gpu(local_rank: usize, count: usize, numbered: &str) -> Result<Device, LaunchError> {
    if count == 0 {
        return Err(LaunchError::Device(NO_GPU.into()));
    }
    if local_rank >= count {
        return Err(LaunchError::Device(format!(
            "{numbered} {local_rank} needs a GPU of its own, but LibTorch sees {count}; start fewer ranks, or give all ranks \
             one device where they share a GPU or each sees only its own"
        )));
    }
    #[cfg(feature = "libtorch")]
    return Ok(Device::libtorch_cuda(local_rank));
    #[cfg(not(feature = "libtorch"))]
    Err(LaunchError::Device(NO_GPU.into()))
}

/// How many GPUs LibTorch sees.
fn gpu_count() -> usize {
    #[cfg(feature = "libtorch")]
    return usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    #[cfg(not(feature = "libtorch"))]
    0
}

/// Index of the GPU that a device is, if it is one of LibTorch's.
pub(super) fn gpu_of(device: &Device) -> Option<usize> {
    #[cfg(feature = "libtorch")]
    if let burn::backend::DispatchDevice::LibTorch(burn_tch::LibTorchDevice::Cuda(index)) =
        device.clone().inner().as_dispatch()
    {
        return Some(*index);
    }
    let _ = device;
    None
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_a_device() {
        for device in [RankDevice::Cpu, RankDevice::Given(Device::flex())] {
            assert_eq!(device.of(3, "rank").unwrap(), Device::flex());
            assert!(!device.is_own_gpu());
        }
        let auto = RankDevice::Auto.of(0, "rank").unwrap();
        assert_eq!(RankDevice::Auto.is_own_gpu(), gpu_of(&auto) == Some(0));
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error() {
        let error = RankDevice::Gpu.of(4096, "rank").unwrap_err().to_string();
        assert!(error.contains("LibTorch"), "{error}");
        #[cfg(feature = "libtorch")]
        {
            let error = RankDevice::Given(Device::libtorch_cuda(4096)).of(0, "rank").unwrap_err().to_string();
            assert!(error.contains("LibTorch sees"), "{error}");
        }
    }
}
