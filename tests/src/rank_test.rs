use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

#[cfg(feature = "mpi")]
use burn_fsep::comm::mpi::MpiConfig;
use burn_fsep::{FsepError, comm::Communicator, launch::RankEnvironment};

use crate::{Launcher, RankProcesses, rank_processes::FOLDER_VARIABLE};

/// Ranks that are this test program again, each running one of its tests that is ignored otherwise.
impl RankProcesses {
    /// Starts a test as the ranks of a job.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_test(launcher: Launcher, size: usize, test: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        Self::start(launcher, size, &command)
    }

    /// Whether a rank that has ended did so as a test that passed.
    pub fn passed(&mut self, rank: usize) -> bool {
        self.code(rank).is_none_or(|code| code == 0) && self.said(rank).contains("test result: ok. 1 passed")
    }

    /// Waits until all ranks have passed.
    ///
    /// # Panics
    ///
    /// If one does not; as [`wait`](Self::wait).
    pub fn wait_until_passed(&mut self, limit: Duration) {
        self.wait(limit);
        for rank in 0..self.size {
            assert!(self.passed(rank), "rank {rank} failed\n{}", self.all_said());
        }
    }
}

/// In a rank's process: runs `program` over the engine that the suite was built for, with the folder of its
/// [`RankProcesses`]. Processes exchange over sockets; with the feature `mpi` over MPI; with `nccl` over NCCL, all on
/// the first GPU.
///
/// # Panics
///
/// If the rank fails: its process ends with the error.
pub fn rank_of_process<T>(program: impl FnOnce(Arc<dyn Communicator>, &Path) -> Program<T>) -> T {
    rank_of_job(|control, folder| over_engine(control, |comm| program(comm, folder)))
}

/// As [`rank_of_process`], with this configuration of MPI.
///
/// # Panics
///
/// If the rank fails: its process ends with the error.
#[cfg(feature = "mpi")]
pub fn rank_over_mpi<T>(config: &MpiConfig, program: impl FnOnce(Arc<dyn Communicator>, &Path) -> Program<T>) -> T {
    rank_of_job(|control, folder| config.run(control, |comm| program(comm, folder)))
}

/// As [`rank_of_process`], over sockets.
fn rank_of_job<T>(program: impl FnOnce(Arc<dyn Communicator>, &Path) -> Program<T>) -> T {
    let folder = PathBuf::from(std::env::var_os(FOLDER_VARIABLE).expect("started by RankProcesses"));
    let environment = RankEnvironment::from_env().expect("started by RankProcesses");
    let config = environment.process_config().expect("started by RankProcesses");
    let result = config.run(|control| program(control, &folder));
    result.unwrap_or_else(|error| panic!("rank {}: {error}", environment.rank))
}

type Program<T> = Result<T, FsepError>;

#[cfg(not(any(feature = "mpi", feature = "nccl")))]
fn over_engine<T>(
    control: Arc<dyn Communicator>,
    program: impl FnOnce(Arc<dyn Communicator>) -> Program<T>,
) -> Program<T> {
    program(control)
}

#[cfg(feature = "mpi")]
fn over_engine<T>(
    control: Arc<dyn Communicator>,
    program: impl FnOnce(Arc<dyn Communicator>) -> Program<T>,
) -> Program<T> {
    MpiConfig::new().run(control, program)
}

#[cfg(all(feature = "nccl", not(feature = "mpi")))]
fn over_engine<T>(
    control: Arc<dyn Communicator>,
    program: impl FnOnce(Arc<dyn Communicator>) -> Program<T>,
) -> Program<T> {
    program(Arc::new(burn_fsep::comm::nccl::NcclConfig::new(0).init(control)?))
}
