use burn::{backend::DispatchDevice, tensor::Device};

use crate::FsepError;

/// The backends that this build has operations for, as [`backend_extension`](burn::backend::backend_extension) lists them.
const BACKENDS: &[&str] = &[
    #[cfg(feature = "cube")]
    "Cube",
    #[cfg(feature = "flex")]
    "Flex",
    #[cfg(feature = "libtorch")]
    "LibTorch",
];

/// Whether this build has operations for the backend of a device: a forward pass on another one would panic.
///
/// # Errors
///
/// [`FsepError::UnsupportedDevice`], which lists those that it has.
pub fn check_device(device: &Device) -> Result<(), FsepError> {
    check_backend(backend_of(device.as_dispatch()), device)
}

fn check_backend(backend: &str, device: &Device) -> Result<(), FsepError> {
    if BACKENDS.contains(&backend) {
        return Ok(());
    }
    Err(FsepError::UnsupportedDevice { device: format!("{device:?}"), backends: BACKENDS.join(", ") })
}

/// The backend's name in the list; none for one that cannot be in it.
fn backend_of(device: &DispatchDevice) -> &'static str {
    match device {
        DispatchDevice::Autodiff(device) => backend_of(device),
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(_) => "Cube",
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => "Flex",
        #[cfg(feature = "libtorch")]
        DispatchDevice::LibTorch(_) => "LibTorch",
        #[allow(unreachable_patterns)]
        _ => "",
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    #[test]
    fn devices_of_listed_backends_pass_and_others_are_told_the_list() {
        for device in [Device::flex(), Device::flex().autodiff()] {
            assert_eq!(check_device(&device), Ok(()));
        }
        let error = check_backend("NdArray", &Device::flex()).unwrap_err();
        let FsepError::UnsupportedDevice { backends, .. } = &error else { panic!("{error}") };
        assert!(backends.contains("Flex") && error.to_string().contains(backends), "{error}");
    }
}
