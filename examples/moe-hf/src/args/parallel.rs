use std::{str::FromStr, time::Duration};

use burn::tensor::{Device, FloatDType};
use burn_fsep::launch::{Engine, RankConfig, RankDevice, Ranks};
use clap::{Args, ValueEnum};

use super::command::{check_positive, refuse};
use crate::MoeHfError;

/// Ranks, where they compute, and how they share the experts.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Ranks")]
pub struct ParallelArgs {
    /// Ranks, each with its shard of every expert, as threads of this process [default: 4 for finetune, otherwise 1]. With a
    /// launcher it says how many there are.
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
    /// Types of parameters and computation.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub dtype: Dtype,
    /// Seconds that a rank waits for the others in a collective.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: u32,
    /// Seconds that the processes of a job wait for each other at its start.
    #[arg(long, value_name = "SECONDS", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
    pub rendezvous_timeout: u32,
    /// Experts that a rank restores at once [default: just enough for all experts, plus one].
    #[arg(long)]
    pub slots: Option<usize>,
    /// Leave the experts where they are: static expert parallelism's layout, without a planner.
    #[arg(long)]
    pub no_planner: bool,
    /// Wait for the planner in each step, so that a run can be repeated bit for bit.
    #[arg(long)]
    pub synchronous: bool,
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
}

/// Types of parameters and computation.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// Single precision.
    F32,
    /// Parameters, gradients and optimizer state in single precision, computation in bfloat16.
    Mixed,
    /// All in bfloat16.
    Bf16,
}

impl Dtype {
    /// Of the parameters.
    pub(crate) fn parameters(self) -> FloatDType {
        match self {
            Self::F32 | Self::Mixed => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
        }
    }

    /// Of the computation.
    pub(crate) fn compute(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Mixed | Self::Bf16 => FloatDType::BF16,
        }
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

/// More than a rendezvous of processes, or the threads of a process, can be.
const MAX_RANKS: usize = 1025;

impl ParallelArgs {
    /// Checks the options and what the environment says; returns the ranks in this process, `threads` without a launcher and
    /// `--ranks`.
    ///
    /// # Errors
    ///
    /// [`MoeHfError`] naming the first option or variable that cannot work.
    pub(crate) fn init(&self, threads: usize) -> Result<Ranks, MoeHfError> {
        self.check()?;
        let ranks = RankConfig::new()
            .with_threads(self.ranks.unwrap_or(threads))
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
            .init()?;
        let world_size = ranks.world_size();
        match self.ranks {
            Some(asked) if ranks.environment().is_some() && asked != world_size => refuse(format!(
                "--ranks {asked} contradicts the launcher, which says that there are {world_size}; leave --ranks out"
            )),
            _ => Ok(ranks),
        }
    }

    fn rank_device(&self) -> RankDevice {
        match (self.backend, self.device) {
            #[cfg(feature = "libtorch")]
            (Backend::Libtorch, DeviceArg::Cpu) => RankDevice::Given(Device::libtorch()),
            #[cfg(feature = "libtorch")]
            (Backend::Libtorch, DeviceArg::CudaAt(index)) => RankDevice::Given(Device::libtorch_cuda(index)),
            (_, DeviceArg::Cuda) => RankDevice::Gpu,
            // What was not built was refused before.
            _ => RankDevice::Given(Device::flex()),
        }
    }

    fn check(&self) -> Result<(), MoeHfError> {
        check_positive([("--ranks", self.ranks.unwrap_or(1)), ("--slots", self.slots.unwrap_or(1))])?;
        if let Some(ranks @ MAX_RANKS..) = self.ranks {
            return refuse(format!("--ranks {ranks}: more than {} are too many for this job", MAX_RANKS - 1));
        }
        let is_gpu = self.device != DeviceArg::Cpu;
        if self.backend == Backend::Flex && is_gpu {
            return refuse("--device cuda needs --backend libtorch: flex computes on the CPU".into());
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
                     -p moe-hf --features {feature}`"
                ));
            }
        }
        Ok(())
    }
}
