use std::{str::FromStr, time::Duration};

use burn::tensor::Device;
#[cfg(any(feature = "cuda", feature = "metal", feature = "rocm", feature = "vulkan", feature = "webgpu"))]
use burn::tensor::DeviceType;
use burn_fsep::{
    launch::{Engine, RankConfig, RankDevice},
    planner::PlannerStrategy,
};
use clap::{Args, ValueEnum};

use super::command::{check_positive, refuse};
use crate::MoeLmError;

/// Ranks, where they compute, and how they share the experts.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Ranks")]
pub struct ParallelArgs {
    /// Ranks, each with its shard of every expert, as threads of this process [default: 4]. With a launcher it says how
    /// many there are.
    #[arg(long)]
    pub ranks: Option<usize>,
    /// How ranks exchange, and whether they are threads of this process or processes of a launcher.
    #[arg(long, value_enum, default_value_t = Comm::Auto)]
    pub comm: Comm,
    /// What computes.
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    pub backend: Backend,
    /// cpu; cuda: a GPU for each rank of a machine; or cuda:N: this GPU for all.
    #[arg(long, value_name = "cpu|cuda|cuda:N", default_value = "cpu")]
    pub device: DeviceArg,
    /// Seconds that a rank waits for the others in a collective.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: u32,
    /// Seconds that the processes of a job wait for each other at its start. More, where a scheduler starts them far apart.
    #[arg(long, value_name = "SECONDS", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
    pub rendezvous_timeout: u32,
    /// Ranks on a node [default: as the launcher says; without one, all].
    #[arg(long)]
    pub ranks_per_node: Option<usize>,
    /// Experts that a rank restores at once [default: just enough for all experts, plus one].
    #[arg(long)]
    pub slots: Option<usize>,
    /// How experts are laid out over ranks: by the paper's planner, by ours, fixed (static expert parallelism), or anew in each
    /// step.
    #[arg(long, value_enum, default_value_t = Planner::MinMax)]
    pub planner: Planner,
    /// Wait for the planner in each step, so that a run can be repeated bit for bit.
    #[arg(long)]
    pub synchronous: bool,
    /// Let every layer restore its experts and return its gradients by itself, with nothing behind compute.
    #[arg(long)]
    pub no_prefetch: bool,
}

/// How ranks exchange.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comm {
    /// Threads of this process, or processes over TCP if a launcher started it; NCCL with --device cuda in a build with it.
    Auto,
    /// Threads of this process, through its memory.
    Local,
    /// Processes of a launcher (fsep-launch, torchrun, mpirun, srun), over TCP.
    Process,
    /// Processes that mpirun or srun starts, over MPI.
    Mpi,
    /// NCCL between GPUs: processes of a launcher, or threads of this process if there is none.
    Nccl,
}

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
    /// Burn's own GPU backends: the option, the feature that they need, and whether this program has it.
    fn own(self) -> Option<(&'static str, &'static str, bool)> {
        Some(match self {
            Backend::Flex | Backend::Libtorch => return None,
            Backend::Vulkan => ("--backend vulkan", "vulkan", cfg!(feature = "vulkan")),
            Backend::Webgpu => ("--backend webgpu", "webgpu", cfg!(feature = "webgpu")),
            Backend::Cuda => ("--backend cuda", "cuda", cfg!(feature = "cuda")),
            Backend::Rocm => ("--backend rocm", "rocm", cfg!(feature = "rocm")),
            Backend::Metal => ("--backend metal", "metal", cfg!(feature = "metal")),
        })
    }
}

/// Where ranks compute.
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

/// How experts are laid out over ranks.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planner {
    /// The planner of LAER-MoE.
    Paper,
    /// Robust layouts and exact dispatch.
    MinMax,
    /// As many replicas as loads want, at places that are drawn anew for each step, and exact dispatch: for tests.
    Random,
    /// Static expert parallelism with resident experts.
    Static,
}

impl Planner {
    pub(crate) fn strategy(self) -> PlannerStrategy {
        match self {
            Planner::Paper => PlannerStrategy::Paper,
            Planner::MinMax => PlannerStrategy::MinMax,
            Planner::Random => PlannerStrategy::Random,
            Planner::Static => PlannerStrategy::Static,
        }
    }
}

/// More than a rendezvous of processes, or the threads of a process, can be.
const MAX_RANKS: usize = 1025;

impl ParallelArgs {
    /// How this process becomes a rank, or `threads` ranks without a launcher.
    pub(crate) fn rank_config(&self, threads: usize) -> RankConfig {
        RankConfig::new()
            .with_threads(threads)
            .with_engine(match self.comm {
                Comm::Auto => Engine::Auto,
                Comm::Local => Engine::Local,
                Comm::Process => Engine::Process,
                Comm::Mpi => Engine::Mpi,
                Comm::Nccl => Engine::Nccl,
            })
            .with_device(self.rank_device())
            .with_timeout(Duration::from_secs(self.timeout.into()))
            .with_rendezvous_timeout(Duration::from_secs(self.rendezvous_timeout.into()))
    }

    fn rank_device(&self) -> RankDevice {
        match (self.backend, self.device) {
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
            // What was not built was refused before.
            _ => RankDevice::Given(Device::flex()),
        }
    }

    pub(super) fn check(&self) -> Result<(), MoeLmError> {
        check_positive([
            ("--ranks", self.ranks.unwrap_or(1) as u64),
            ("--ranks-per-node", self.ranks_per_node.unwrap_or(1) as u64),
            ("--slots", self.slots.unwrap_or(1) as u64),
        ])?;
        if let Some(ranks @ MAX_RANKS..) = self.ranks {
            return refuse(format!("--ranks {ranks}: more than {} are too many for this job", MAX_RANKS - 1));
        }
        let is_gpu = self.device != DeviceArg::Cpu;
        if self.backend == Backend::Flex && is_gpu {
            return refuse("--device cuda needs --backend libtorch: flex computes on the CPU".into());
        }
        if let Some((option, feature, is_built)) = self.backend.own() {
            if !is_built {
                return refuse(format!(
                    "{option}: this program was built without it; build with `cargo build --release -p moe-lm --features \
                     {feature},fusion,autotune`"
                ));
            }
            if is_gpu || self.comm == Comm::Nccl {
                return refuse(format!(
                    "--device and --comm nccl are those of --backend libtorch; with {option} ranks take the GPUs in turns, and \
                     exchange through host memory"
                ));
            }
        }
        if self.comm == Comm::Nccl && !is_gpu {
            return refuse("--comm nccl needs --backend libtorch --device cuda: it exchanges between GPUs".into());
        }
        const LIBTORCH: &str = "LibTorch as the README says under \"On NVIDIA GPUs\"";
        const MPI: &str = "an MPI library as docs/guide.md says under \"MPI\"";
        for (option, is_asked, needs, feature, is_built) in [
            ("--backend libtorch", self.backend == Backend::Libtorch, LIBTORCH, "libtorch", cfg!(feature = "libtorch")),
            ("--comm nccl", self.comm == Comm::Nccl, LIBTORCH, "nccl", cfg!(feature = "nccl")),
            ("--comm mpi", self.comm == Comm::Mpi, MPI, "mpi", cfg!(feature = "mpi")),
        ] {
            if is_asked && !is_built {
                return refuse(format!(
                    "{option}: this program was built without it; get {needs}, then build with `cargo build --release \
                     -p moe-lm --features {feature}`"
                ));
            }
        }
        Ok(())
    }
}
