use std::str::FromStr;

/// Where ranks compute on Flex and LibTorch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceArg {
    /// On the CPU.
    Cpu,
    /// On the GPU of the rank's number on its machine.
    Cuda,
    /// All on this GPU.
    CudaAt(usize),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda),
            (_, Some(Ok(index))) => Ok(Self::CudaAt(index)),
            _ => Err("devices are cpu, cuda, and cuda:N with the number of a GPU".into()),
        }
    }
}
