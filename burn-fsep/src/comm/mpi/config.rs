use std::{sync::Arc, time::Duration};

use derive_new::new;

use super::{MpiCommunicator, MpiUniverse, group::Group};
use crate::comm::{CommError, Communicator, Operation, control_group::engine_error};

/// Configuration of a rank's [`MpiCommunicator`].
///
/// ```no_run
/// use burn_fsep::{FsepError, FsepRuntime, comm::mpi::MpiConfig, launch::RankEnvironment};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// RankEnvironment::from_env()?.process_config()?.run(|control| {
///     MpiConfig::new().run(control, |comm| -> Result<(), FsepError> {
///         let runtime = FsepRuntime::new(comm)?;
///         // .. build the model and train it
///         Ok(())
///     })
/// })?;
/// # Ok(())
/// # }
/// ```
#[derive(new, Debug, Clone)]
pub struct MpiConfig {
    /// How long a collective waits for its peers, and MPI's start for all ranks.
    #[new(value = "Duration::from_secs(30)")]
    pub timeout: Duration,
    /// Whether the ranks compare what they do in each collective; costs a message of 256 bytes to each peer. Equal on all
    /// ranks.
    #[new(value = "cfg!(debug_assertions)")]
    pub check_signatures: bool,
}

impl MpiConfig {
    /// Sets how long a collective waits for its peers, and MPI's start for all ranks (30 s by default); [`Duration::MAX`] is for ever.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets whether the ranks compare what they do in each collective (in debug builds by default): which one it is, its sizes,
    /// and the blocks between any two ranks. Without, ranks that disagree get a timeout, or an error if lengths differ.
    /// Equal on all ranks.
    pub fn with_check_signatures(mut self, check: bool) -> Self {
        self.check_signatures = check;
        self
    }

    /// Connects the ranks of `control`, which are those of `universe` in the same order. Collective.
    ///
    /// The control group carries aborts and tells which rank was lost. The communicator works as long as `universe` lives.
    ///
    /// # Errors
    ///
    /// [`CommError::Engine`] if the ranks are not the same or MPI fails, [`CommError::InvalidArgument`] if only some ranks
    /// compare signatures; the control group's errors.
    pub fn init(&self, universe: &MpiUniverse, control: Arc<dyn Communicator>) -> Result<MpiCommunicator, CommError> {
        let operation = Operation::new("start of MPI");
        let (ours, theirs) = ([control.rank(), control.size()], [universe.rank, universe.size]);
        let group = Group::new(control, universe.library.clone(), self.timeout, self.check_signatures);
        if ours != theirs {
            let reason = format!(
                "rank {} of {} in the control group is rank {} of {} in MPI: start all ranks by one mpirun, and unset RANK \
                 and WORLD_SIZE if another launcher left them",
                ours[0], ours[1], theirs[0], theirs[1]
            );
            return Err(group.control.fail(engine_error(operation, reason)));
        }
        group.control.check_config(operation, self.check_signatures)?;
        MpiCommunicator::connect(group, "control")
    }

    /// Initializes MPI, runs `program` as this rank, and finalizes MPI. Once in a process.
    ///
    /// Call it within [`ProcessConfig::run`](crate::comm::process::ProcessConfig::run), as above, so that the other ranks are
    /// told if `program` returns an error or panics. MPI is not finalized then.
    ///
    /// # Errors
    ///
    /// Those of [`MpiUniverse::init`], [`init`](Self::init), `program` and [`MpiUniverse::finalize`].
    pub fn run<T, E: From<CommError>>(
        &self,
        control: Arc<dyn Communicator>,
        program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, E>,
    ) -> Result<T, E> {
        let universe = MpiUniverse::init_unless(self.timeout, || control.failure())
            .inspect_err(|error| control.abort(&error.to_string()))?;
        let comm = Arc::new(self.init(&universe, control)?);
        let value = program(comm.clone())?;
        universe.finalize(&comm)?;
        Ok(value)
    }
}
