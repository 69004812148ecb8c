use std::sync::Arc;

use burn_fsep::{Timeline, comm::Communicator};

use crate::{Comm, MoeLmError, ParallelArgs};

/// The communicator that a rank trains with; `control` is the group in which the ranks met.
///
/// # Errors
///
/// [`MoeLmError::Fsep`] if the ranks cannot be connected.
pub(crate) fn connect(
    args: &ParallelArgs,
    control: Arc<dyn Communicator>,
    gpu: Option<usize>,
    timeline: Option<&Timeline>,
) -> Result<Arc<dyn Communicator>, MoeLmError> {
    match (args.comm, gpu) {
        (Comm::Local | Comm::Process, _) => Ok(control),
        // One rank exchanges nothing.
        (Comm::Nccl, _) if control.size() == 1 => Ok(control),
        (Comm::Nccl, Some(gpu)) => nccl(args, control, gpu, timeline),
        (Comm::Nccl, None) => Err(MoeLmError::Device("--comm nccl: this rank has no GPU".into())),
    }
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
