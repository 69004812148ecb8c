use burn::tensor::Device;

use crate::{Backend, DeviceArg, MoeLmError, ParallelArgs};

/// What a rank computes on.
#[derive(Debug, Clone)]
pub(crate) struct RankDevice {
    pub device: Device,
    /// Index of its GPU, if it is one.
    pub gpu: Option<usize>,
}

impl RankDevice {
    /// The device of the rank with this number on its machine; `numbered` is what the number is called in messages.
    ///
    /// # Errors
    ///
    /// [`MoeLmError::Device`] if there is no such GPU.
    pub fn of(args: &ParallelArgs, local_rank: usize, numbered: &str) -> Result<Self, MoeLmError> {
        let gpu = match args.device {
            DeviceArg::Cpu => None,
            DeviceArg::Cuda => Some(local_rank),
            DeviceArg::CudaAt(index) => Some(index),
        };
        let device = match (args.backend, gpu) {
            (Backend::Flex, _) => Device::flex(),
            (Backend::Libtorch, gpu) => libtorch(gpu, args.device, numbered)?,
        };
        Ok(Self { device, gpu })
    }
}

#[cfg(feature = "libtorch")]
fn libtorch(gpu: Option<usize>, asked: DeviceArg, numbered: &str) -> Result<Device, MoeLmError> {
    let Some(gpu) = gpu else { return Ok(Device::libtorch()) };
    let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    if count == 0 {
        return Err(MoeLmError::Device(
            "--device cuda: LibTorch sees no GPU: is the NVIDIA driver installed, was LibTorch set up with --cuda, and \
             does CUDA_VISIBLE_DEVICES leave one?"
                .into(),
        ));
    }
    if gpu >= count {
        return Err(MoeLmError::Device(match asked {
            DeviceArg::CudaAt(_) => format!("--device cuda:{gpu}: LibTorch sees {count} GPU(s), numbered from 0"),
            _ => format!(
                "--device cuda: {numbered} {gpu} needs a GPU of its own, but LibTorch sees {count}; start fewer ranks, or \
                 give --device cuda:0 where ranks share a GPU or each sees only its own"
            ),
        }));
    }
    Ok(Device::libtorch_cuda(gpu))
}

#[cfg(not(feature = "libtorch"))]
fn libtorch(_: Option<usize>, _: DeviceArg, _: &str) -> Result<Device, MoeLmError> {
    // The options were checked before.
    Err(MoeLmError::Device("this program was built without LibTorch".into()))
}
