#[cfg(not(feature = "mpi"))]
use std::{
    fs::File,
    process::{Child, Command},
    time::{Duration, Instant},
};
use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn_fsep::{
    FsepError,
    comm::{Communicator, RankEnvironment, TOKEN_VARIABLE, process::JobToken},
};

/// How a rank's process ended.
#[derive(Debug)]
pub struct RankOutput {
    /// Whether it ended without an error.
    pub succeeded: bool,
    /// What it printed.
    pub text: String,
}

/// Variables that every rank gets: where rank 0 listens, the secret, and the folder for what ranks leave.
pub(crate) fn job_variables(folder: &Path) -> [(&'static str, String); 4] {
    // Free a moment ago, which is as good as it gets: the ranks bind it themselves.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
    let token = JobToken::random().expect("random numbers").reveal().to_string();
    let folder = folder.to_str().expect("a folder with a plain name").to_string();
    [
        ("MASTER_ADDR", "127.0.0.1".to_string()),
        ("MASTER_PORT", port.to_string()),
        (TOKEN_VARIABLE, token),
        ("FSEP_TEST_FOLDER", folder),
    ]
}

/// How a test program is asked for one test that is a rank.
pub(crate) fn rank_arguments(test: &str) -> [&str; 5] {
    [test, "--exact", "--ignored", "--nocapture", "--test-threads=1"]
}

/// What a rank has printed so far.
pub(crate) fn rank_text(folder: &Path, rank: usize) -> String {
    String::from_utf8_lossy(&std::fs::read(folder.join(format!("rank-{rank}.txt"))).unwrap_or_default()).into_owned()
}

/// Ranks that are processes of their own: this test program again, running one of its tests that is ignored otherwise.
#[cfg(not(feature = "mpi"))]
#[derive(Debug)]
pub struct RankProcesses {
    ranks: Vec<Child>,
    folder: PathBuf,
}

#[cfg(not(feature = "mpi"))]
impl RankProcesses {
    /// Starts `test` as `ranks` processes; `folder` takes their output, and what they want to leave.
    ///
    /// # Panics
    ///
    /// If a process cannot be started.
    pub fn start(ranks: usize, test: &str, folder: &Path) -> Self {
        let variables = job_variables(folder);
        let start = |rank: usize| {
            let output = File::create(folder.join(format!("rank-{rank}.txt"))).expect("a file for the output");
            Command::new(std::env::current_exe().expect("this program"))
                .args(rank_arguments(test))
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", ranks.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .envs(variables.iter().cloned())
                .stderr(output.try_clone().expect("a file"))
                .stdout(output)
                .spawn()
                .expect("a process")
        };
        Self { ranks: (0..ranks).map(start).collect(), folder: folder.to_path_buf() }
    }

    /// Kills a rank without notice.
    ///
    /// # Panics
    ///
    /// If it is gone already.
    pub fn kill(&mut self, rank: usize) {
        self.ranks[rank].kill().expect("the rank runs");
    }

    /// Waits for all ranks to end; by rank.
    ///
    /// # Panics
    ///
    /// If one does not in time.
    pub fn wait(mut self, patience: Duration) -> Vec<RankOutput> {
        let deadline = Instant::now() + patience;
        (0..self.ranks.len())
            .map(|rank| {
                loop {
                    let text = || rank_text(&self.folder, rank);
                    if let Some(status) = self.ranks[rank].try_wait().expect("a child") {
                        return RankOutput { succeeded: status.success(), text: text() };
                    }
                    assert!(Instant::now() < deadline, "rank {rank} did not end within {patience:?}:\n{}", text());
                    std::thread::sleep(Duration::from_millis(20));
                }
            })
            .collect()
    }
}

#[cfg(not(feature = "mpi"))]
impl Drop for RankProcesses {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}

/// In a rank's process: runs `program` over the engine that the suite was built for, with the folder that was given to
/// `RankProcesses::start`. Processes exchange over sockets; with the feature `mpi` over MPI; with `nccl` over NCCL, all on
/// the first GPU.
///
/// # Panics
///
/// If the rank fails: its process ends with the error.
pub fn rank_of_process<T>(program: impl FnOnce(Arc<dyn Communicator>, &Path) -> Program<T>) -> T {
    rank_of_job(|control, folder| over_engine(control, |comm| program(comm, folder)))
}

/// As [`rank_of_process`], over sockets.
pub(crate) fn rank_of_job<T>(program: impl FnOnce(Arc<dyn Communicator>, &Path) -> Program<T>) -> T {
    let folder = PathBuf::from(std::env::var_os("FSEP_TEST_FOLDER").expect("started by RankProcesses"));
    let environment = RankEnvironment::from_env().expect("started by RankProcesses");
    let config = environment.process_config().expect("started by RankProcesses");
    #[cfg(feature = "mpi")]
    crate::mpirun::enroll(&folder, environment.rank);
    let result = config.run(|control| program(control, &folder));
    let value = result.unwrap_or_else(|error| panic!("rank {}: {error}", environment.rank));
    #[cfg(feature = "mpi")]
    crate::mpirun::succeed(&folder, environment.rank);
    value
}

pub(crate) type Program<T> = Result<T, FsepError>;

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
    burn_fsep::comm::mpi::MpiConfig::new().run(control, program)
}

#[cfg(all(feature = "nccl", not(feature = "mpi")))]
fn over_engine<T>(
    control: Arc<dyn Communicator>,
    program: impl FnOnce(Arc<dyn Communicator>) -> Program<T>,
) -> Program<T> {
    program(Arc::new(burn_fsep::comm::nccl::NcclConfig::new(0).init(control)?))
}
