//! The devices of Burn's own GPU backends on this machine.

use burn::{
    backend::DispatchDevice,
    tensor::{Device, DeviceType},
};

use super::LaunchError;

/// The devices of this kind that ranks take in turns: where there are several, only the fastest sort of them, since a rank waits for
/// the others. A driver in software (a CPU that speaks Vulkan) counts only where there is nothing else.
///
/// # Errors
///
/// [`LaunchError::Device`] if there is none, or none that this build's shaders run on; it says what to install.
pub(super) fn devices_of(kind: &DeviceType) -> Result<Vec<Device>, LaunchError> {
    let devices = Device::enumerate(kind.clone()).into_iter().map(|device| (speed(&device), device)).collect();
    fastest(devices, kind)
}

/// The devices of the lowest number, of all devices of a kind.
fn fastest(devices: Vec<(u8, Device)>, kind: &DeviceType) -> Result<Vec<Device>, LaunchError> {
    let Some(best) = devices.iter().map(|(speed, _)| *speed).min() else {
        return Err(LaunchError::Device(format!("there is no device of {kind:?} here: {}", missing(kind))));
    };
    if best == SOFTWARE && cfg!(feature = "vulkan") {
        // They end the process: CubeCL 0.11's SPIR-V has invalid shared memory where the driver lacks
        // VK_KHR_workgroup_memory_explicit_layout (docs/upstream.md).
        return Err(LaunchError::Device(format!(
            "all that {kind:?} has here is a driver in software, which cannot run SPIR-V of CubeCL: install the GPU's driver, or build \
             with the feature `webgpu` in place of `vulkan`"
        )));
    }
    Ok(devices.into_iter().filter(|(speed, _)| *speed == best).map(|(_, device)| device).collect())
}

/// The speed of a driver that computes on the CPU.
const SOFTWARE: u8 = 3;

/// 0 for the fastest sort of device.
fn speed(device: &Device) -> u8 {
    #[cfg(any(feature = "metal", feature = "vulkan", feature = "webgpu"))]
    if let DispatchDevice::Cube(burn::backend::CubeDevice::Wgpu(device)) = device.as_dispatch() {
        use burn::backend::WgpuDeviceKind;
        return match device.kind {
            WgpuDeviceKind::DiscreteGpu(_) => 0,
            WgpuDeviceKind::IntegratedGpu(_) => 1,
            WgpuDeviceKind::Cpu => SOFTWARE,
            _ => 2,
        };
    }
    let _: &DispatchDevice = device.as_dispatch();
    0
}

/// What to do where there is no such device.
fn missing(kind: &DeviceType) -> &'static str {
    #[allow(unreachable_patterns)]
    match kind {
        #[cfg(feature = "vulkan")]
        DeviceType::Vulkan => VULKAN,
        #[cfg(any(feature = "metal", feature = "vulkan", feature = "webgpu"))]
        DeviceType::Wgpu if cfg!(target_os = "linux") => VULKAN,
        #[cfg(feature = "cuda")]
        DeviceType::Cuda => {
            "is the NVIDIA driver installed (`nvidia-smi` lists GPUs), and does CUDA_VISIBLE_DEVICES leave one?"
        }
        #[cfg(feature = "rocm")]
        DeviceType::Rocm => "are the AMD driver and ROCm installed (`rocminfo` lists GPUs)?",
        #[cfg(feature = "metal")]
        DeviceType::Metal => "Metal is part of macOS and found nowhere else",
        #[cfg(feature = "webgpu")]
        DeviceType::WebGpu => "outside of a browser take `DeviceType::Wgpu`",
        _ => "is its driver installed?",
    }
}

#[cfg(any(feature = "metal", feature = "vulkan", feature = "webgpu"))]
const VULKAN: &str = "install a Vulkan driver, which NVIDIA's driver brings along; on Debian and Ubuntu `apt-get install libvulkan1 \
     mesa-vulkan-drivers` has those of AMD and Intel and one in software (`vulkaninfo --summary` lists what is found)";

#[cfg(all(test, feature = "flex", any(feature = "metal", feature = "vulkan", feature = "webgpu")))]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_devices_are_taken_and_a_missing_driver_is_named() {
        let devices = |speeds: &[u8]| speeds.iter().map(|&speed| (speed, Device::flex())).collect();
        for (speeds, taken) in [(&[1, 0, SOFTWARE, 0][..], 2), (&[1, SOFTWARE], 1)] {
            assert_eq!(fastest(devices(speeds), &DeviceType::Wgpu).unwrap().len(), taken);
        }
        let error = fastest(devices(&[]), &DeviceType::Wgpu).unwrap_err().to_string();
        assert!(error.contains("driver"), "{error}");
        let software = fastest(devices(&[SOFTWARE]), &DeviceType::Wgpu);
        assert_eq!(software.is_err(), cfg!(feature = "vulkan"), "{software:?}");
    }
}
