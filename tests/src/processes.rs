use std::{
    fs::File,
    net::TcpListener,
    path::Path,
    process::{Child, Command, ExitStatus},
    sync::Arc,
    time::{Duration, Instant},
};

use burn_fsep::comm::{CommError, Communicator, RankEnvironment, process::JobToken};

/// Ranks that are processes of their own: this test program again, running one of its tests that is ignored otherwise.
#[derive(Debug)]
pub struct RankProcesses {
    ranks: Vec<Child>,
    folder: std::path::PathBuf,
}

/// How a rank's process ended.
#[derive(Debug)]
pub struct RankOutput {
    /// Its exit code or signal.
    pub status: ExitStatus,
    /// What it printed.
    pub text: String,
}

impl RankProcesses {
    /// Starts `test` as `ranks` processes; `folder` takes their output, and what they want to leave.
    ///
    /// # Panics
    ///
    /// If a process cannot be started.
    pub fn start(ranks: usize, test: &str, folder: &Path) -> Self {
        // Free a moment ago, which is as good as it gets: the ranks bind it themselves.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
        let token = JobToken::random().expect("random numbers").reveal();
        let start = |rank: usize| {
            let output = File::create(folder.join(format!("rank-{rank}.txt"))).expect("a file for the output");
            Command::new(std::env::current_exe().expect("this program"))
                .args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", ranks.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .env("BURN_FSEP_TOKEN", &token)
                .env("FSEP_TEST_FOLDER", folder)
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
                    let text = || {
                        let file = self.folder.join(format!("rank-{rank}.txt"));
                        String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned()
                    };
                    if let Some(status) = self.ranks[rank].try_wait().expect("a child") {
                        return RankOutput { status, text: text() };
                    }
                    assert!(Instant::now() < deadline, "rank {rank} did not end within {patience:?}:\n{}", text());
                    std::thread::sleep(Duration::from_millis(20));
                }
            })
            .collect()
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}

/// In a rank's process: runs `program` over the engine that the suite was built for, with the folder that was given to
/// [`RankProcesses::start`]. Processes exchange over sockets; with the feature `nccl` over NCCL, all on the first GPU.
///
/// # Panics
///
/// If the rank fails: its process ends with the error.
pub fn rank_of_process<T>(program: impl FnOnce(Arc<dyn Communicator>, &Path) -> Result<T, burn_fsep::FsepError>) -> T {
    let folder = std::env::var_os("FSEP_TEST_FOLDER").expect("started by RankProcesses");
    let environment = RankEnvironment::from_env().expect("started by RankProcesses");
    let config = environment.process_config().expect("started by RankProcesses");
    let result = config.run(|control| program(engine(control)?, folder.as_ref()));
    result.unwrap_or_else(|error| panic!("rank {}: {error}", environment.rank))
}

#[cfg(not(feature = "nccl"))]
fn engine(control: Arc<dyn Communicator>) -> Result<Arc<dyn Communicator>, CommError> {
    Ok(control)
}

#[cfg(feature = "nccl")]
fn engine(control: Arc<dyn Communicator>) -> Result<Arc<dyn Communicator>, CommError> {
    Ok(Arc::new(burn_fsep::comm::nccl::NcclConfig::new(0).init(control)?))
}
