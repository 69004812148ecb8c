use burn_fsep::launch::Engine;
use clap::ValueEnum;

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

impl Comm {
    pub(crate) fn engine(self) -> Engine {
        match self {
            Comm::Auto => Engine::Auto,
            Comm::Local => Engine::Local,
            Comm::Process => Engine::Process,
            Comm::Mpi => Engine::Mpi,
            Comm::Nccl => Engine::Nccl,
        }
    }
}
