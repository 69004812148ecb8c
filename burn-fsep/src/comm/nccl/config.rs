use std::{sync::Arc, time::Duration};

use cudarc::driver::CudaContext;
use derive_new::new;

use super::{NcclCommunicator, watchdog::Group};
use crate::{
    Timeline,
    comm::{
        CommError, Communicator, Operation,
        control_group::{ControlGroup, engine_error},
    },
};

/// Configuration of a rank's [`NcclCommunicator`].
#[derive(new, Debug, Clone)]
pub struct NcclConfig {
    /// Index of this rank's GPU, among those that the process sees.
    pub gpu: usize,
    /// How long a collective waits for its peers.
    #[new(value = "Duration::from_secs(30)")]
    pub timeout: Duration,
    /// Whether the ranks compare what they are about to do before each collective; costs a collective of the control group
    /// each time.
    #[new(value = "cfg!(debug_assertions)")]
    pub check_signatures: bool,
    /// Thread blocks of an exchange that compute hides, of parameters and their gradients (NCCL's `maxCTAs`); each takes a
    /// multiprocessor from the experts. As many as tokens have by default, and at most.
    #[new(default)]
    pub background_ctas: Option<usize>,
    /// Records the exchanges between buffers on the GPU, a track for each communicator.
    #[new(default)]
    pub timeline: Option<Timeline>,
}

impl NcclConfig {
    /// Sets how long a collective waits for its peers (30 s by default).
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets whether the ranks compare what they are about to do before each collective (in debug builds by default).
    /// Equal on all ranks.
    pub fn with_check_signatures(mut self, check: bool) -> Self {
        self.check_signatures = check;
        self
    }

    /// Sets how many thread blocks an exchange has that compute hides. A power of two, to which NCCL rounds up.
    pub fn with_background_ctas(mut self, ctas: Option<usize>) -> Self {
        self.background_ctas = ctas;
        self
    }

    /// Sets the timeline that records exchanges between buffers on the GPU, which [`Timeline::of_gpu`] makes.
    pub fn with_timeline(mut self, timeline: Timeline) -> Self {
        self.timeline = Some(timeline);
        self
    }

    /// Connects the ranks of `control`, each with its GPU. Collective.
    ///
    /// The control group introduces the ranks, carries aborts and tells which rank was lost; its collectives carry some
    /// hundred bytes at most.
    ///
    /// # Errors
    ///
    /// [`CommError::Engine`] where there is no NCCL, no such GPU, or NCCL cannot connect the ranks,
    /// [`CommError::InvalidArgument`] if only some ranks compare signatures; the control group's errors.
    pub fn init(&self, control: Arc<dyn Communicator>) -> Result<NcclCommunicator, CommError> {
        let operation = Operation::new("start of NCCL");
        let control = ControlGroup::new(control, self.timeout);
        let fail = |reason: String| control.fail(engine_error(operation, reason));
        // cudarc panics where a library is missing.
        // SAFETY: these only ask whether the libraries can be loaded.
        let [has_driver, has_nccl] =
            unsafe { [cudarc::driver::sys::is_culib_present(), cudarc::nccl::sys::is_culib_present()] };
        if !has_driver {
            return Err(fail("libcuda was not found: is the NVIDIA driver installed?".into()));
        }
        if !has_nccl {
            return Err(fail(
                "libnccl.so was not found: put its folder on LD_LIBRARY_PATH (scripts/libtorch.py --cuda does)".into(),
            ));
        }
        if self.background_ctas == Some(0) {
            return Err(fail("`background_ctas` is 0: an exchange needs a thread block at least".into()));
        }
        let context =
            CudaContext::new(self.gpu).map_err(|error| fail(format!("GPU {} cannot be used: {error}", self.gpu)))?;
        control.check_config(operation, self.check_signatures)?;
        let group = Group::new(control, context, self.background_ctas, self.timeline.clone())?;
        NcclCommunicator::connect(group, "control", false, self.check_signatures)
    }
}
