use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use burn_fsep::{
    comm::{
        CommError, Communicator, EnvironmentError, RankEnvironment,
        local::{LaunchConfig, RankError, launch},
    },
    planner::Topology,
};

use crate::{Comm, MoeLmError, ParallelArgs, device::RankDevice};

/// Variables in which launchers say how many processes they started.
const WORLD_SIZES: [&str; 3] = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];

/// Ranks of the job that are in this process.
#[derive(Debug)]
pub(crate) enum Ranks {
    /// All of them, as threads.
    Threads(usize),
    /// One: the process itself.
    Process(RankEnvironment),
}

impl Ranks {
    /// What options and environment make of this process.
    ///
    /// # Errors
    ///
    /// [`MoeLmError`] if they contradict each other, or a launcher's variables are needed and missing.
    pub fn of(args: &ParallelArgs, dense: bool, lookup: impl Fn(&str) -> Option<String>) -> Result<Self, MoeLmError> {
        let refuse = |message: String| Err(MoeLmError::Option(message));
        let environment = match (args.comm, RankEnvironment::from_lookup(&lookup)) {
            (Comm::Local, _) => None,
            (Comm::Nccl, Err(EnvironmentError::NotLaunched)) if args.ranks.is_some() => None,
            (Comm::Nccl, Err(EnvironmentError::NotLaunched)) => {
                return refuse(
                    "--comm nccl: no launcher started this process (fsep-launch, torchrun, mpirun, srun), so --ranks has \
                     to say how many threads with a GPU each there shall be"
                        .into(),
                );
            }
            (Comm::Process | Comm::Mpi | Comm::Nccl, environment) => Some(environment?),
        };
        let Some(environment) = environment else {
            let started = |name: &str| lookup(name).and_then(|value| value.trim().parse::<usize>().ok());
            if let Some(name) = WORLD_SIZES.iter().find(|name| started(name).is_some_and(|count| count > 1)) {
                return refuse(format!(
                    "a launcher started several processes ({name}={}), but with --comm local each would train by itself; \
                     give --comm process, mpi or nccl, or start the program without a launcher",
                    lookup(name).unwrap_or_default()
                ));
            }
            if let (true, Some(ranks @ 2..)) = (dense, args.ranks) {
                return refuse(format!("--ranks {ranks} contradicts --dense, which trains on one rank"));
            }
            return Ok(Self::Threads(if dense { 1 } else { args.ranks.unwrap_or(4) }));
        };
        if let Some(ranks) = args.ranks.filter(|&ranks| ranks != environment.world_size) {
            return refuse(format!(
                "--ranks {ranks} contradicts the launcher, which says that there are {}; leave --ranks out",
                environment.world_size
            ));
        }
        if dense && environment.world_size > 1 {
            return refuse(format!(
                "--dense trains on one rank, but the launcher started {}; start one process",
                environment.world_size
            ));
        }
        // The one thing that only its use would show.
        environment.process_config()?;
        Ok(Self::Process(environment))
    }

    pub fn world_size(&self) -> usize {
        match self {
            Ranks::Threads(ranks) => *ranks,
            Ranks::Process(environment) => environment.world_size,
        }
    }

    /// Whether the first rank is here: it prints, and writes what is there once.
    pub fn has_first(&self) -> bool {
        match self {
            Ranks::Threads(_) => true,
            Ranks::Process(environment) => environment.rank == 0,
        }
    }

    /// Which ranks share a node, if it is known. Collective.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    pub fn topology(&self, comm: &dyn Communicator) -> Result<Option<Topology>, CommError> {
        match self {
            Ranks::Threads(_) => Ok(None),
            Ranks::Process(environment) => environment.topology(comm),
        }
    }

    /// The devices of the ranks in this process.
    ///
    /// # Errors
    ///
    /// [`MoeLmError::Device`] if one has none.
    pub fn devices(&self, args: &ParallelArgs) -> Result<Vec<RankDevice>, MoeLmError> {
        match self {
            Ranks::Threads(ranks) => (0..*ranks).map(|rank| RankDevice::of(args, rank, "rank")).collect(),
            Ranks::Process(environment) => {
                Ok(vec![RankDevice::of(args, environment.local_rank, "the rank with LOCAL_RANK")?])
            }
        }
    }

    /// Runs the program of a rank, given its communicator and its number in this process, and returns the result of the
    /// first rank in this process.
    ///
    /// # Errors
    ///
    /// The error of the rank that failed of itself, rather than for another's sake.
    pub fn run<T: Send>(
        &self,
        args: &ParallelArgs,
        program: impl Fn(Arc<dyn Communicator>, usize) -> Result<T, MoeLmError> + Sync,
    ) -> Result<T, MoeLmError> {
        match self {
            Ranks::Threads(ranks) => {
                let config = LaunchConfig::new(*ranks).with_timeout(args.timeout());
                let run = |comm: Arc<dyn Communicator>| {
                    let rank = comm.rank();
                    program(comm.clone(), rank)
                        .map_err(|error| Failure { for_another: lost_peer(&*comm).is_some(), error })
                };
                first_result(launch(&config, run))
            }
            Ranks::Process(environment) => run_process(environment, args, |comm| program(comm, 0)),
        }
    }
}

/// The program of a rank that is a process.
fn run_process<T>(
    environment: &RankEnvironment,
    args: &ParallelArgs,
    program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, MoeLmError>,
) -> Result<T, MoeLmError> {
    let config = environment.process_config()?;
    let config = config.with_timeout(args.timeout()).with_rendezvous_timeout(args.rendezvous_timeout());
    let (rank, first_reports) = (environment.rank, Cell::new(false));
    let run = || {
        config.run(|comm| {
            let result = program(comm.clone());
            // Of a rank that did not say why it is gone, every other one says what it knows; all else reaches the first rank.
            let is_loss =
                matches!(comm.failure(), Some(CommError::PeerFailed { lost: true, .. } | CommError::Timeout { .. }));
            // mpirun kills the others, the first rank too, as soon as it sees a rank end with an error of its own.
            let speaks_itself = args.comm == Comm::Mpi && lost_peer(&*comm).is_none();
            first_reports.set(rank != 0 && !is_loss && !speaks_itself);
            result
        })
    };
    // The panic's message comes from the hook.
    let result =
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(MoeLmError::Ranks(format!("rank {rank} panicked"))));
    result.map_err(|error| match first_reports.into_inner() {
        true => MoeLmError::ReportedByFirst(Box::new(error)),
        false => error,
    })
}

/// The other rank whose failure ended the group, if one did.
fn lost_peer(comm: &dyn Communicator) -> Option<usize> {
    match comm.failure() {
        Some(CommError::PeerFailed { rank, .. }) if rank != comm.rank() => Some(rank),
        _ => None,
    }
}

/// A rank's error.
struct Failure {
    error: MoeLmError,
    /// Whether it only came because another rank failed.
    for_another: bool,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

/// The first rank's result, or the error of the rank that failed of itself.
fn first_result<T>(ranks: Vec<Result<T, RankError<Failure>>>) -> Result<T, MoeLmError> {
    let mut first = None;
    let mut errors = Vec::new();
    for rank in ranks {
        match rank {
            Ok(result) => {
                first.get_or_insert(result);
            }
            Err(error) => errors.push(error),
        }
    }
    let own = |error: &RankError<Failure>| !matches!(error, RankError::Failed { error, .. } if error.for_another);
    match errors.iter().find(|error| own(error)).or(errors.first()) {
        Some(error) => Err(MoeLmError::Ranks(error.to_string())),
        None => first.ok_or_else(|| MoeLmError::Ranks("no rank has a result".into())),
    }
}
