use std::{sync::Arc, time::Duration};

use burn::tensor::Device;

use super::{EnvironmentError, LaunchError, RankDevice, RankEnvironment, RunError, device::gpu_of};
use crate::{Timeline, comm::Communicator};

/// What carries data between ranks, and with it whether they are threads or processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// Threads of this process where no launcher started it, else processes over TCP; NCCL where each rank has a GPU of its
    /// own and this build has it.
    #[default]
    Auto,
    /// Threads of this process, through its memory.
    Local,
    /// Processes of a launcher (fsep-launch, torchrun, mpirun, srun), over TCP.
    Process,
    /// Processes that mpirun or srun starts, over MPI (feature `mpi`).
    Mpi,
    /// NCCL between GPUs (feature `nccl`): processes of a launcher, or threads of this process if there is none.
    Nccl,
}

/// Variables in which launchers say how many processes they started.
const WORLD_SIZES: [&str; 3] = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];

impl Engine {
    /// This process's place among a launcher's; `None` where ranks are threads.
    pub(super) fn environment(
        self,
        lookup: &impl Fn(&str) -> Option<String>,
    ) -> Result<Option<RankEnvironment>, LaunchError> {
        let started = |name: &str| lookup(name).and_then(|value| value.trim().parse::<usize>().ok());
        let several = WORLD_SIZES.iter().find(|name| started(name).is_some_and(|count| count > 1));
        match (self, RankEnvironment::from_lookup(lookup)) {
            (Engine::Local, _) | (Engine::Auto | Engine::Nccl, Err(EnvironmentError::NotLaunched)) => {}
            // A shell or a batch script of Slurm, in which nothing was started by srun.
            (Engine::Auto, Err(EnvironmentError::Missing { because: "SLURM_PROCID", .. })) if several.is_none() => {}
            (_, environment) => return Ok(Some(environment?)),
        }
        match several {
            None => Ok(None),
            Some(name) => Err(LaunchError::Config(format!(
                "a launcher started several processes ({name}={}), but with ranks as threads each of them would train by \
                 itself; let ranks be processes, or start the program without a launcher",
                lookup(name).unwrap_or_default()
            ))),
        }
    }

    /// What carries the data of ranks with these devices.
    pub(super) fn transport(
        self,
        world_size: usize,
        device: &RankDevice,
        devices: &[Device],
    ) -> Result<Transport, LaunchError> {
        let refuse = |message: &str| Err(LaunchError::Config(message.into()));
        match self {
            Engine::Mpi if cfg!(not(feature = "mpi")) => {
                refuse("this program was built without MPI (feature `mpi` of burn-fsep)")
            }
            Engine::Nccl if cfg!(not(feature = "nccl")) => {
                refuse("this program was built without NCCL (feature `nccl` of burn-fsep)")
            }
            Engine::Nccl if devices.iter().any(|device| gpu_of(device).is_none()) => {
                refuse("NCCL exchanges between GPUs of LibTorch's, but a rank's device is none")
            }
            Engine::Mpi => Ok(Transport::Mpi),
            // One rank exchanges nothing.
            Engine::Nccl if world_size > 1 => Ok(Transport::Nccl),
            Engine::Auto if world_size > 1 && cfg!(feature = "nccl") && device.is_own_gpu() => Ok(Transport::Nccl),
            Engine::Auto | Engine::Local | Engine::Process | Engine::Nccl => Ok(Transport::Control),
        }
    }
}

/// What carries data, once that is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// The group in which the ranks met.
    Control,
    Mpi,
    Nccl,
}

impl Transport {
    /// Runs the program of a rank over the communicator that it trains with; `control` is the group in which the ranks met.
    pub fn run<T, E>(
        self,
        timeout: Duration,
        control: Arc<dyn Communicator>,
        gpu: Option<usize>,
        timeline: Option<&Timeline>,
        program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, RunError<E>>,
    ) -> Result<T, RunError<E>> {
        match self {
            Transport::Control => program(control),
            Transport::Mpi => over_mpi(timeout, control, program),
            Transport::Nccl => program(nccl(timeout, control, gpu, timeline)?),
        }
    }
}

#[cfg(feature = "mpi")]
fn over_mpi<T, E>(
    timeout: Duration,
    control: Arc<dyn Communicator>,
    program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, RunError<E>>,
) -> Result<T, RunError<E>> {
    crate::comm::mpi::MpiConfig::new().with_timeout(timeout).run(control, program)
}

#[cfg(feature = "nccl")]
fn nccl(
    timeout: Duration,
    control: Arc<dyn Communicator>,
    gpu: Option<usize>,
    timeline: Option<&Timeline>,
) -> Result<Arc<dyn Communicator>, crate::comm::CommError> {
    // That there is one was checked before.
    let mut nccl = crate::comm::nccl::NcclConfig::new(gpu.unwrap_or(0)).with_timeout(timeout);
    nccl.timeline = timeline.cloned();
    Ok(Arc::new(nccl.init(control)?))
}

/// Not built, and refused before.
#[cfg(not(feature = "mpi"))]
fn over_mpi<T, E>(
    _: Duration,
    control: Arc<dyn Communicator>,
    program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, RunError<E>>,
) -> Result<T, RunError<E>> {
    program(control)
}

/// Not built, and refused before.
#[cfg(not(feature = "nccl"))]
fn nccl(
    _: Duration,
    control: Arc<dyn Communicator>,
    _: Option<usize>,
    _: Option<&Timeline>,
) -> Result<Arc<dyn Communicator>, crate::comm::CommError> {
    Ok(control)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `None` for threads, else the rank.
    fn place(engine: Engine, variables: &str) -> Result<Option<usize>, String> {
        let lookup = |name: &str| {
            let value = variables.split(' ').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
            Some(value.to_string())
        };
        let environment = engine.environment(&lookup).map_err(|error| error.to_string())?;
        Ok(environment.map(|environment| environment.rank))
    }

    #[test]
    fn a_launcher_makes_processes_and_nothing_else_does() {
        const TORCHRUN: &str = "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500";
        const SRUN: &str = "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1 SLURM_STEP_NUM_TASKS=2";
        // Of `sbatch --ntasks=16`, before srun.
        const BATCH: &str = "SLURM_PROCID=0 SLURM_NTASKS=16 SLURM_LOCALID=0";
        for engine in [Engine::Auto, Engine::Nccl] {
            assert_eq!(place(engine, "HOME=/"), Ok(None));
            assert_eq!(place(engine, TORCHRUN), Ok(Some(1)));
        }
        assert_eq!(place(Engine::Auto, BATCH), Ok(None));
        assert_eq!(place(Engine::Local, BATCH), Ok(None));
        assert_eq!(place(Engine::Local, "RANK=0 WORLD_SIZE=1"), Ok(None));
        assert_eq!(place(Engine::Process, TORCHRUN), Ok(Some(1)));
        for (engine, variables, part) in [
            (Engine::Process, "HOME=/", "this process is no rank"),
            (Engine::Mpi, "HOME=/", "this process is no rank"),
            (Engine::Auto, SRUN, "MASTER_ADDR is not set"),
            (Engine::Process, BATCH, "MASTER_ADDR is not set"),
            (Engine::Auto, "WORLD_SIZE=2", "a launcher started several processes (WORLD_SIZE=2)"),
            (Engine::Local, TORCHRUN, "a launcher started several processes (WORLD_SIZE=2)"),
            (Engine::Local, SRUN, "a launcher started several processes (SLURM_STEP_NUM_TASKS=2)"),
        ] {
            let error = place(engine, variables).unwrap_err();
            assert!(error.contains(part), "{engine:?}, {variables}: {error}");
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    fn what_is_not_built_or_has_no_gpu_is_refused() {
        let transport = |engine: Engine| engine.transport(2, &RankDevice::Cpu, &[Device::flex()]);
        for engine in [Engine::Auto, Engine::Local, Engine::Process] {
            assert_eq!(transport(engine), Ok(Transport::Control));
        }
        let error = transport(Engine::Nccl).unwrap_err().to_string();
        assert!(error.contains(if cfg!(feature = "nccl") { "between GPUs" } else { "feature `nccl`" }), "{error}");
        match transport(Engine::Mpi) {
            Ok(transport) => assert!(cfg!(feature = "mpi") && transport == Transport::Mpi),
            Err(error) => assert!(error.to_string().contains("feature `mpi`"), "{error}"),
        }
    }
}
