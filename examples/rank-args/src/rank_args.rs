use std::time::Duration;

use burn_fsep::{
    FsepRuntimeConfig, ScheduleConfig,
    launch::{RankConfig, Ranks},
};
use clap::Args;

use crate::{Backend, Comm, DeviceArg};

/// Ranks, what they compute on, and how they exchange.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Ranks")]
pub struct RankArgs {
    /// Ranks, each with its shard of every expert, as threads of this process [default: 4 to train, otherwise 1]. With a launcher
    /// it says how many there are.
    #[arg(long)]
    pub ranks: Option<usize>,
    /// Ranks that share the experts: groups of so many ranks are replicas of one another [default: all ranks].
    #[arg(long, value_name = "RANKS")]
    pub expert_parallel_size: Option<usize>,
    /// How ranks exchange, and whether they are threads of this process or processes of a launcher.
    #[arg(long, value_enum, default_value_t = Comm::Auto)]
    pub comm: Comm,
    /// What computes.
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    pub backend: Backend,
    /// cpu; cuda: a GPU for each rank of a machine; or cuda:N: this GPU for all. With flex and libtorch.
    #[arg(long, value_name = "cpu|cuda|cuda:N", default_value = "cpu")]
    pub device: DeviceArg,
    /// Seconds that a rank waits for the others in a collective.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: u32,
    /// Seconds that the processes of a job wait for each other at its start. More, where a scheduler starts them far apart.
    #[arg(long, value_name = "SECONDS", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..))]
    pub rendezvous_timeout: u32,
    /// Experts that a rank restores at once [default: just enough for all experts, plus one].
    #[arg(long)]
    pub slots: Option<usize>,
    /// Last layers that keep their experts from forward to backward, for the memory of their slots.
    #[arg(long, value_name = "LAYERS", default_value_t = 1)]
    pub kept_layers: usize,
    /// Wait for the planner in each step, so that a run can be repeated bit for bit.
    #[arg(long)]
    pub synchronous: bool,
}

/// More than a rendezvous of processes, or the threads of a process, can be.
const MAX_RANKS: usize = 1025;

impl RankArgs {
    /// How this process becomes a rank, or `threads` ranks without a launcher and `--ranks`.
    pub fn rank_config(&self, threads: usize) -> RankConfig {
        RankConfig::new()
            .with_threads(self.ranks.unwrap_or(threads))
            .with_engine(self.comm.engine())
            .with_device(self.backend.rank_device(self.device))
            .with_timeout(Duration::from_secs(self.timeout.into()))
            .with_rendezvous_timeout(Duration::from_secs(self.rendezvous_timeout.into()))
    }

    /// The ranks' runtime, of the options that concern it.
    pub fn runtime_config(&self) -> FsepRuntimeConfig {
        let mut config =
            FsepRuntimeConfig::new().with_schedule(ScheduleConfig::new().with_kept_layers(self.kept_layers));
        config.expert_parallel_size = self.expert_parallel_size;
        config
    }

    /// Whether there are as many ranks as `--ranks` says, which a launcher decides where there is one.
    ///
    /// # Errors
    ///
    /// What contradicts what.
    pub fn check_launcher(&self, ranks: &Ranks) -> Result<(), String> {
        let world_size = ranks.world_size();
        match self.ranks {
            Some(asked) if ranks.environment().is_some() && asked != world_size => Err(format!(
                "--ranks {asked} contradicts the launcher, which says that there are {world_size}; leave --ranks out"
            )),
            _ => Ok(()),
        }
    }

    /// Whether the options can work in a build of the package `program`.
    ///
    /// # Errors
    ///
    /// What is wrong with the first option that cannot.
    pub fn check(&self, program: &str) -> Result<(), String> {
        let numbers =
            [("--ranks", self.ranks), ("--slots", self.slots), ("--expert-parallel-size", self.expert_parallel_size)];
        for (name, number) in numbers {
            if number == Some(0) {
                return Err(format!("{name} must be at least 1"));
            }
        }
        if let Some(ranks @ MAX_RANKS..) = self.ranks {
            return Err(format!("--ranks {ranks}: more than {} are too many for this job", MAX_RANKS - 1));
        }
        let is_gpu = self.device != DeviceArg::Cpu;
        if self.backend == Backend::Flex && is_gpu {
            return Err("--device cuda needs --backend libtorch: flex computes on the CPU".into());
        }
        if let Some((option, feature, is_built)) = self.backend.own() {
            if !is_built {
                return Err(format!(
                    "{option}: this program was built without it; build with `cargo build --release -p {program} --features \
                     {feature},fusion,autotune`"
                ));
            }
            if is_gpu || self.comm == Comm::Nccl {
                return Err(format!(
                    "--device and --comm nccl are those of --backend libtorch; with {option} ranks take the GPUs in turns, and \
                     exchange through host memory"
                ));
            }
        }
        if self.comm == Comm::Nccl && !is_gpu {
            return Err("--comm nccl needs --backend libtorch --device cuda: it exchanges between GPUs".into());
        }
        const LIBTORCH: &str = "LibTorch as the README says under \"On NVIDIA GPUs\"";
        const MPI: &str = "an MPI library as docs/guide.md says under \"MPI\"";
        for (option, is_asked, needs, feature, is_built) in [
            ("--backend libtorch", self.backend == Backend::Libtorch, LIBTORCH, "libtorch", cfg!(feature = "libtorch")),
            ("--comm nccl", self.comm == Comm::Nccl, LIBTORCH, "nccl", cfg!(feature = "nccl")),
            ("--comm mpi", self.comm == Comm::Mpi, MPI, "mpi", cfg!(feature = "mpi")),
        ] {
            if is_asked && !is_built {
                return Err(format!(
                    "{option}: this program was built without it; get {needs}, then build with `cargo build --release -p {program} \
                     --features {feature}`"
                ));
            }
        }
        Ok(())
    }
}
