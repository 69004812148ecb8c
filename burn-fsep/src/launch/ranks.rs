use std::{fmt, sync::Arc};

use burn::tensor::Device;

use super::{LaunchError, Rank, RankConfig, RankEnvironment, RunError, device::gpu_of, engine::Transport};
use crate::{
    Timeline,
    burn_compat::panic_message,
    comm::{
        CommError, Communicator, Difference, Operation, agree,
        local::{LaunchConfig, RankError, launch},
    },
};

/// The ranks of a job that are in this process: all of them as threads, or one of a launcher's.
#[derive(Debug)]
pub struct Ranks {
    pub(super) config: RankConfig,
    /// `None` if ranks are threads.
    pub(super) environment: Option<RankEnvironment>,
    /// One for each rank in this process.
    pub(super) devices: Vec<Device>,
    pub(super) transport: Transport,
}

impl Ranks {
    /// World size `N`.
    pub fn world_size(&self) -> usize {
        self.environment.as_ref().map_or(self.devices.len(), |environment| environment.world_size)
    }

    /// Whether rank 0 is in this process: it prints, and writes what is there once.
    pub fn has_first(&self) -> bool {
        self.environment.as_ref().is_none_or(|environment| environment.rank == 0)
    }

    /// What the launcher said; `None` if the ranks are threads of this process.
    pub fn environment(&self) -> Option<&RankEnvironment> {
        self.environment.as_ref()
    }

    /// Connects the ranks, runs `program` as each rank in this process, and returns the result of the first of them.
    ///
    /// A rank whose program returns an error or panics ends the job: the collectives of all others return an error that
    /// says so.
    ///
    /// # Errors
    ///
    /// [`RunError`], of the rank that failed of itself rather than for another's sake. In a job of processes what the first
    /// rank learns before it is done, it reports, whatever its own program returned; that is [`RunError::ReportedByFirst`] on all
    /// others.
    pub fn run<T, E>(&self, program: impl Fn(Rank) -> Result<T, E> + Sync) -> Result<T, RunError<E>>
    where
        T: Send,
        E: fmt::Display + Send,
    {
        match &self.environment {
            Some(environment) => self.run_process(environment, program),
            None => self.run_threads(program),
        }
    }

    fn run_threads<T: Send, E: fmt::Display + Send>(
        &self,
        program: impl Fn(Rank) -> Result<T, E> + Sync,
    ) -> Result<T, RunError<E>> {
        let config = LaunchConfig::new(self.devices.len()).with_timeout(self.config.timeout);
        let ranks = launch(&config, |control| {
            let device = self.devices[control.rank()].clone();
            let result = self.run_rank(control.clone(), device, None, &program);
            result.map_err(|error| ThreadError { for_another: lost_peer(&*control).is_some(), error })
        });
        let mut first = None;
        let mut errors = Vec::new();
        for rank in ranks {
            match rank {
                Ok(result) => drop(first.get_or_insert(result)),
                Err(error) => errors.push(error),
            }
        }
        let own =
            |error: &RankError<ThreadError<E>>| !matches!(error, RankError::Failed { error, .. } if error.for_another);
        let told = errors.iter().position(own).unwrap_or(0);
        match (errors.into_iter().nth(told), first) {
            (None, Some(result)) => Ok(result),
            (None, None) => unreachable!("a job has a rank"),
            (Some(error), _) => Err(RunError::Rank(Box::new(match error {
                RankError::Failed { rank, error } => RankError::Failed { rank, error: error.error },
                RankError::Panicked { rank, message } => RankError::Panicked { rank, message },
                RankError::NotStarted { rank, message } => RankError::NotStarted { rank, message },
            }))),
        }
    }

    fn run_process<T, E: fmt::Display>(
        &self,
        environment: &RankEnvironment,
        program: impl FnOnce(Rank) -> Result<T, E>,
    ) -> Result<T, RunError<E>> {
        let config = environment.process_config().map_err(LaunchError::from)?;
        let config = config.with_timeout(self.config.timeout).with_rendezvous_timeout(self.config.rendezvous_timeout);
        let rank = environment.rank;
        let comm = Arc::new(config.init().map_err(CommError::from)?);
        let run = |control| self.run_rank(control, self.devices[0].clone(), Some(environment), program);
        let result = comm.run(run).map_err(|payload| {
            let message = panic_message(payload.as_ref());
            RunError::Rank(Box::new(RankError::Panicked { rank, message }))
        })?;
        // What is known now, after this rank has left, is what its peers know of each other, too.
        let failure = comm.failure();
        // Of a rank that did not say why it is gone, every other one says what it knows; all else reaches the first rank.
        let is_loss = matches!(failure, Some(CommError::PeerFailed { lost: true, .. } | CommError::Timeout { .. }));
        match (result, failure) {
            // The others leave it to the first rank, whose own program was over before a collective could say it.
            (Ok(_), Some(failure)) if rank == 0 && !is_loss => Err(failure.seen_from("end of the program").into()),
            (Ok(result), _) => Ok(result),
            (Err(error), _) => {
                // mpirun kills the others, the first rank too, as soon as it sees a rank end with an error of its own.
                let does_first_miss_it = self.transport == Transport::Mpi || comm.has_left(0);
                let speaks_itself = does_first_miss_it && lost_peer(&*comm).is_none();
                let first_reports = rank != 0 && !is_loss && !speaks_itself;
                Err(if first_reports { RunError::ReportedByFirst(Box::new(error)) } else { error })
            }
        }
    }

    /// Runs the program of one rank, over the group in which the ranks met.
    fn run_rank<T, E>(
        &self,
        control: Arc<dyn Communicator>,
        device: Device,
        environment: Option<&RankEnvironment>,
        program: impl FnOnce(Rank) -> Result<T, E>,
    ) -> Result<T, RunError<E>> {
        let mut topology = None;
        if let Some(environment) = environment {
            self.check_engine(&*control)?;
            topology = environment.topology(&*control)?;
        }
        let gpu = gpu_of(&device);
        let timeline = self.config.timeline.then(|| timeline(gpu)).transpose()?;
        self.transport.run(self.config.timeout, control, gpu, timeline.clone().as_ref(), |comm| {
            program(Rank { comm, device, gpu, topology, timeline }).map_err(RunError::Program)
        })
    }

    /// Ranks with other engines would wait for each other in different libraries.
    fn check_engine<E>(&self, control: &dyn Communicator) -> Result<(), RunError<E>> {
        const TRANSPORTS: [Transport; 3] = [Transport::Control, Transport::Mpi, Transport::Nccl];
        let ours = TRANSPORTS.iter().position(|transport| *transport == self.transport).unwrap_or(0);
        match agree(control, Operation::new("engine of the ranks"), &[("engine", ours as u64)])? {
            Some(Difference { rank, .. }) => Err(LaunchError::Config(format!(
                "ranks 0 and {rank} exchange through different engines ({:?} is configured here): give all the same, and the \
                 same build",
                self.config.engine
            ))
            .into()),
            None => Ok(()),
        }
    }
}

fn timeline(gpu: Option<usize>) -> Result<Timeline, LaunchError> {
    match gpu {
        #[cfg(any(feature = "libtorch", feature = "nccl"))]
        Some(gpu) => Timeline::of_gpu(gpu).map_err(|error| LaunchError::Device(error.to_string())),
        _ => Ok(Timeline::new()),
    }
}

/// The other rank whose failure ended the group, if one did.
fn lost_peer(comm: &dyn Communicator) -> Option<usize> {
    match comm.failure() {
        Some(CommError::PeerFailed { rank, .. }) if rank != comm.rank() => Some(rank),
        _ => None,
    }
}

/// The error of a rank that is a thread.
struct ThreadError<E> {
    error: RunError<E>,
    /// Whether it only came because another rank failed.
    for_another: bool,
}

impl<E: fmt::Display> fmt::Display for ThreadError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::{FsepError, FsepRuntimeConfig};

    const MEETING: Operation = Operation::new("meeting");

    fn threads(count: usize) -> RankConfig {
        RankConfig::new().with_threads(count).with_device(super::super::RankDevice::Cpu)
    }

    /// Processes of one job, as threads; each is changed before it runs.
    fn processes<T: Send>(
        local_ranks: &[usize],
        change: impl Fn(&mut Ranks, usize) + Sync,
        program: impl Fn(Rank) -> Result<T, FsepError> + Sync,
    ) -> Vec<Result<T, RunError<FsepError>>> {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let process = |rank: usize| {
            let variables = [
                ("SLURM_PROCID", rank.to_string()),
                ("SLURM_NTASKS", local_ranks.len().to_string()),
                ("SLURM_LOCALID", local_ranks[rank].to_string()),
                ("MASTER_ADDR", "127.0.0.1".into()),
                ("MASTER_PORT", port.to_string()),
                (super::super::TOKEN_VARIABLE, "0123456789abcdef".into()),
            ];
            let lookup =
                |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.clone());
            let mut ranks = threads(7).init_from(lookup).unwrap();
            assert_eq!((ranks.world_size(), ranks.has_first()), (local_ranks.len(), rank == 0));
            change(&mut ranks, rank);
            ranks.run(&program)
        };
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..local_ranks.len()).map(|rank| scope.spawn(move || process(rank))).collect();
            started.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn threads_are_ranks_and_the_first_ones_result_counts() {
        let result = threads(3).run(|rank| -> Result<_, FsepError> {
            let runtime = rank.runtime(FsepRuntimeConfig::new())?;
            assert_eq!((rank.is_first(), runtime.world_size()), (runtime.rank() == 0, 3));
            assert!(rank.timeline.is_none() && rank.gpu.is_none() && rank.topology.is_none());
            Ok(runtime.rank())
        });
        assert_eq!(result, Ok(0));
        let error = threads(0).run(|_| Ok::<_, FsepError>(())).unwrap_err();
        assert!(matches!(error, RunError::Launch(LaunchError::Config(_))), "{error}");
    }

    #[test]
    fn the_thread_that_failed_of_itself_is_told() {
        let fail = |panics: bool| {
            let run = threads(3).run(|rank| -> Result<(), FsepError> {
                if rank.comm.rank() == 1 {
                    assert!(!panics, "rank 1 is broken");
                    return Err(FsepError::Callback("of rank 1".into()));
                }
                Ok(rank.comm.barrier(MEETING)?)
            });
            run.unwrap_err()
        };
        let error = fail(false);
        assert_eq!(error.to_string(), "rank 1: training callback: of rank 1");
        assert_eq!(error.program(), Some(&FsepError::Callback("of rank 1".into())));
        assert_eq!(fail(true).to_string(), "rank 1 panicked: rank 1 is broken");
    }

    #[test]
    fn processes_know_who_shares_a_machine_with_them() {
        let topologies = processes(
            &[0, 0, 1],
            |_, _| {},
            |rank| {
                rank.runtime(FsepRuntimeConfig::new().with_ranks_per_node(2))?;
                rank.runtime(FsepRuntimeConfig::new())?;
                Ok(rank.topology)
            },
        );
        for topology in topologies {
            assert_eq!(topology.unwrap(), Some(burn_fsep_planner::Topology::new(&[1, 2]).unwrap()));
        }
    }

    #[test]
    fn the_first_process_reports_what_it_learns() {
        let ends = processes(
            &[0, 1],
            |_, _| {},
            |rank| match rank.is_first() {
                true => Ok(rank.comm.barrier(MEETING)?),
                false => Err(FsepError::Callback("of rank 1".into())),
            },
        );
        let [first, second] = [&ends[0], &ends[1]].map(|end| end.as_ref().unwrap_err());
        assert!(matches!(first, RunError::Program(FsepError::Comm(CommError::PeerFailed { rank: 1, .. }))), "{first}");
        assert!(first.to_string().contains("of rank 1"), "{first}");
        assert!(matches!(second, RunError::ReportedByFirst(_)), "{second}");
        assert_eq!(second.program(), Some(&FsepError::Callback("of rank 1".into())));
    }

    #[test]
    fn an_error_after_the_first_process_is_done_is_told_once() {
        // Before, while, and after rank 0 leaves.
        for delay in [0, 1, 300] {
            let program = |rank: Rank| {
                rank.comm.barrier(MEETING)?;
                if rank.is_first() {
                    return Ok(());
                }
                std::thread::sleep(std::time::Duration::from_millis(delay));
                Err(FsepError::Callback("of rank 1".into()))
            };
            let ends = processes(&[0, 1], |_, _| {}, program);
            assert_eq!(ends[1].as_ref().unwrap_err().program(), Some(&FsepError::Callback("of rank 1".into())));
            let errors = ends.iter().filter_map(|end| end.as_ref().err());
            let told = errors.filter(|error| !matches!(error, RunError::ReportedByFirst(_)));
            let told: Vec<_> = told.map(ToString::to_string).collect();
            assert!(told.len() == 1 && told[0].contains("of rank 1"), "{delay} ms: {told:?}");
        }
    }

    #[test]
    fn a_panic_of_a_process_names_it() {
        let ends = processes(
            &[0, 1],
            |_, _| {},
            |rank| {
                assert!(rank.is_first(), "rank 1 is broken");
                Ok(rank.comm.barrier(MEETING)?)
            },
        );
        let errors: Vec<String> = ends.into_iter().map(|end| end.unwrap_err().to_string()).collect();
        assert!(errors[0].contains("panicked: rank 1 is broken"), "{errors:?}");
        assert_eq!(errors[1], "rank 1 panicked: rank 1 is broken");
    }

    #[test]
    fn processes_with_other_engines_do_not_meet_in_different_libraries() {
        let other = |ranks: &mut Ranks, rank: usize| {
            if rank == 1 {
                ranks.transport = Transport::Mpi;
            }
        };
        for end in processes(&[0, 1], other, |_| Ok(())) {
            let error = end.unwrap_err().to_string();
            assert!(error.contains("ranks 0 and 1 exchange through different engines"), "{error}");
        }
    }
}
