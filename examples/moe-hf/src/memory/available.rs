use burn_fsep::launch::Rank;
use rank_args::{Backend, DeviceArg, RankArgs};

/// A rank's memory: whose it is, and how many ranks take of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Bytes that are free; `None` where nobody tells.
    pub free: Option<u64>,
    /// Ranks that take of them.
    pub sharing: usize,
    /// Ranks whose memory [`PeakMemory`](super::PeakMemory) measures together.
    pub measured: usize,
}

impl Place {
    /// Where a rank of these options computes. `is_thread`: all ranks are threads of this process.
    pub fn of(rank: &Rank, args: &RankArgs, is_thread: bool) -> Self {
        let of_machine = match &rank.topology {
            _ if is_thread => rank.comm.size(),
            Some(topology) => topology.ranks_of(topology.node_of(rank.comm.rank())).len(),
            None => 1,
        };
        if let Some(gpu) = rank.gpu {
            let sharing = if matches!(args.device, DeviceArg::CudaAt(_)) { of_machine } else { 1 };
            return Self { free: free_of_gpu(gpu), sharing, measured: sharing };
        }
        let free = match args.backend {
            Backend::Flex | Backend::Libtorch => {
                std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(mem_available)
            }
            // Burn's GPU backends do not tell what a GPU has.
            _ => None,
        };
        Self { free, sharing: of_machine, measured: if is_thread { of_machine } else { 1 } }
    }

    /// Bytes that each of the ranks may take.
    pub fn limit(&self) -> Option<u64> {
        self.free.map(|free| free / self.sharing.max(1) as u64)
    }
}

/// What Linux can give to programs without swapping. `meminfo`: /proc/meminfo
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(feature = "libtorch")]
fn free_of_gpu(gpu: usize) -> Option<u64> {
    let gpu = cudarc::driver::CudaContext::new(gpu).ok()?;
    gpu.mem_get_info().ok().map(|(free, _)| free as u64)
}

#[cfg(not(feature = "libtorch"))]
fn free_of_gpu(_: usize) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       24000 kB\nMemFree:         100 kB\nMemAvailable:   2048 kB\n";
        assert_eq!(mem_available(text), Some(2 << 20));
        for text in ["", "MemAvailable: x kB", "MemAvailable: 5", "MemAvailable: 18446744073709551615 kB"] {
            assert_eq!(mem_available(text), None, "{text}");
        }
    }

    #[test]
    fn ranks_share_what_there_is() {
        let place = |free| Place { free, sharing: 4, measured: 1 };
        assert_eq!((place(Some(10)).limit(), place(None).limit()), (Some(2), None));
    }
}
