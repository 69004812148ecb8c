/// The most memory that a rank has taken: of its GPU, or of the process.
///
/// LibTorch keeps what it has once taken of a GPU, so that is what its allocator has reserved at most; with
/// `PYTORCH_NO_CUDA_MEMORY_CACHING=1` it is what tensors took, and steps are slower.
pub(crate) struct PeakMemory {
    #[cfg(feature = "libtorch")]
    gpu: Option<gpu::Watch>,
}

impl PeakMemory {
    /// Before anything is computed.
    pub fn start(gpu: Option<usize>) -> Self {
        #[cfg(feature = "libtorch")]
        return Self { gpu: gpu.and_then(gpu::Watch::start) };
        #[cfg(not(feature = "libtorch"))]
        {
            let _ = gpu;
            Self {}
        }
    }

    /// The most so far, in GiB; not a number where the system does not tell.
    pub fn gib(self) -> f64 {
        #[cfg(feature = "libtorch")]
        if let Some(gpu) = self.gpu {
            return gpu.peak() as f64 / (1u64 << 30) as f64;
        }
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.map_or(f64::NAN, |kib| kib / (1u64 << 20) as f64)
    }
}

#[cfg(feature = "libtorch")]
mod gpu {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread::{self, JoinHandle},
        time::Duration,
    };

    use cudarc::driver::CudaContext;

    /// A thread that looks at a GPU's free memory.
    pub(super) struct Watch {
        free_before: usize,
        done: Arc<AtomicBool>,
        least: JoinHandle<usize>,
    }

    impl Watch {
        pub fn start(gpu: usize) -> Option<Self> {
            let gpu = CudaContext::new(gpu).ok()?;
            let free = move || gpu.mem_get_info().map_or(usize::MAX, |(free, _)| free);
            let (free_before, done) = (free(), Arc::new(AtomicBool::new(false)));
            let least = thread::spawn({
                let done = done.clone();
                move || {
                    let mut least = free_before;
                    while !done.load(Ordering::Relaxed) {
                        least = least.min(free());
                        thread::sleep(Duration::from_micros(200));
                    }
                    least.min(free())
                }
            });
            Some(Self { free_before, done, least })
        }

        pub fn peak(self) -> usize {
            self.done.store(true, Ordering::Relaxed);
            self.free_before - self.least.join().unwrap_or(self.free_before)
        }
    }
}
