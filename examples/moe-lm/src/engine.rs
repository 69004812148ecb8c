use std::sync::Arc;

use burn_fsep::{Timeline, comm::Communicator};

use crate::{Comm, MoeLmError, ParallelArgs};

/// Runs the program of a rank over the communicator that it trains with; `control` is the group in which the ranks met.
///
/// # Errors
///
/// Those of `program`, and [`MoeLmError::Fsep`] if the ranks cannot be connected.
pub(crate) fn run<T>(
    args: &ParallelArgs,
    control: Arc<dyn Communicator>,
    gpu: Option<usize>,
    timeline: Option<&Timeline>,
    program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, MoeLmError>,
) -> Result<T, MoeLmError> {
    match (args.comm, gpu) {
        (Comm::Local | Comm::Process, _) => program(control),
        (Comm::Mpi, _) => mpi(args, control, program),
        // One rank exchanges nothing.
        (Comm::Nccl, _) if control.size() == 1 => program(control),
        (Comm::Nccl, Some(gpu)) => program(nccl(args, control, gpu, timeline)?),
        (Comm::Nccl, None) => Err(MoeLmError::Device("--comm nccl: this rank has no GPU".into())),
    }
}

#[cfg(feature = "mpi")]
fn mpi<T>(
    args: &ParallelArgs,
    control: Arc<dyn Communicator>,
    program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, MoeLmError>,
) -> Result<T, MoeLmError> {
    burn_fsep::comm::mpi::MpiConfig::new().with_timeout(args.timeout()).run(control, program)
}

#[cfg(not(feature = "mpi"))]
fn mpi<T>(
    _: &ParallelArgs,
    _: Arc<dyn Communicator>,
    _: impl FnOnce(Arc<dyn Communicator>) -> Result<T, MoeLmError>,
) -> Result<T, MoeLmError> {
    // The options were checked before.
    Err(MoeLmError::Device("this program was built without MPI".into()))
}

#[cfg(feature = "nccl")]
fn nccl(
    args: &ParallelArgs,
    control: Arc<dyn Communicator>,
    gpu: usize,
    timeline: Option<&Timeline>,
) -> Result<Arc<dyn Communicator>, MoeLmError> {
    let mut config = burn_fsep::comm::nccl::NcclConfig::new(gpu).with_timeout(args.timeout());
    config.timeline = timeline.cloned();
    Ok(Arc::new(config.init(control)?))
}

#[cfg(not(feature = "nccl"))]
fn nccl(
    _: &ParallelArgs,
    _: Arc<dyn Communicator>,
    _: usize,
    _: Option<&Timeline>,
) -> Result<Arc<dyn Communicator>, MoeLmError> {
    // The options were checked before.
    Err(MoeLmError::Device("this program was built without NCCL".into()))
}
