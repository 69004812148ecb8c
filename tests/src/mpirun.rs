use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::Arc,
    time::{Duration, Instant},
};

use burn_fsep::{
    FsepError,
    comm::{Communicator, mpi::MpiConfig},
};

use crate::processes::{RankOutput, job_variables, rank_arguments, rank_of_job, rank_text};

/// Lets the other ranks end by themselves when one is lost.
const RECOVERY: &str = "--enable-recovery";

/// Ranks that `mpirun` starts: this test program again, running one of its tests that is ignored otherwise.
#[derive(Debug)]
pub struct RankProcesses {
    mpirun: Child,
    ranks: usize,
    folder: PathBuf,
}

impl RankProcesses {
    /// Starts `test` as `ranks` processes; `folder` takes their output, and what they want to leave. Ranks survive the loss of
    /// another.
    ///
    /// # Panics
    ///
    /// If mpirun cannot be started.
    pub fn start(ranks: usize, test: &str, folder: &Path) -> Self {
        Self::start_with(ranks, test, folder, &[RECOVERY])
    }

    /// As [`start`](Self::start), with these options of mpirun.
    ///
    /// # Panics
    ///
    /// If mpirun cannot be started.
    pub fn start_with(ranks: usize, test: &str, folder: &Path, options: &[&str]) -> Self {
        let variables = job_variables(folder);
        let output = File::create(folder.join("mpirun.txt")).expect("a file for the output");
        // mpirun binds ranks to cores, of which they would then have one for all their threads.
        let mut command = Command::new("mpirun");
        command
            .args(["-n", &ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"])
            .args(options)
            .args(variables.iter().flat_map(|(name, _)| ["-x", name]))
            // A file for each rank, which becomes the test program itself.
            .args(["sh", "-c", "exec \"$@\" > \"$FSEP_TEST_FOLDER/rank-$OMPI_COMM_WORLD_RANK.txt\" 2>&1", "rank"])
            .arg(std::env::current_exe().expect("this program"))
            .args(rank_arguments(test))
            .envs(variables.iter().cloned())
            .stderr(output.try_clone().expect("a file"))
            .stdout(output);
        for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"] {
            command.env_remove(name);
        }
        let mpirun = command.spawn().expect("mpirun (Debian: openmpi-bin)");
        Self { mpirun, ranks, folder: folder.to_path_buf() }
    }

    /// Kills a rank without notice.
    ///
    /// # Panics
    ///
    /// If it has not begun, or is gone already.
    pub fn kill(&mut self, rank: usize) {
        let pid = fs::read_to_string(self.folder.join(format!("pid-{rank}"))).expect("the rank has begun");
        assert!(signal("KILL", &pid), "rank {rank} runs");
    }

    /// Waits for mpirun to end; the ranks' outputs, by rank.
    ///
    /// # Panics
    ///
    /// If it does not in time.
    pub fn wait(self, patience: Duration) -> Vec<RankOutput> {
        self.wait_for_mpirun(patience).0
    }

    /// As [`wait`](Self::wait); also how mpirun ended and what it said.
    ///
    /// # Panics
    ///
    /// If it does not in time.
    pub fn wait_for_mpirun(mut self, patience: Duration) -> (Vec<RankOutput>, ExitStatus, String) {
        let deadline = Instant::now() + patience;
        let output = |rank| RankOutput {
            succeeded: self.folder.join(format!("succeeded-{rank}")).exists(),
            text: rank_text(&self.folder, rank),
        };
        let status = loop {
            if let Some(status) = self.mpirun.try_wait().expect("a child") {
                break status;
            }
            let texts = || (0..self.ranks).map(output).map(|output| output.text).collect::<String>();
            assert!(Instant::now() < deadline, "mpirun did not end within {patience:?}:\n{}", texts());
            std::thread::sleep(Duration::from_millis(20));
        };
        let said = fs::read(self.folder.join("mpirun.txt")).unwrap_or_default();
        ((0..self.ranks).map(output).collect(), status, String::from_utf8_lossy(&said).into_owned())
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        if !matches!(self.mpirun.try_wait(), Ok(None)) {
            return;
        }
        // Asked to end, it ends its ranks, too.
        signal("TERM", &self.mpirun.id().to_string());
        let start = Instant::now();
        while matches!(self.mpirun.try_wait(), Ok(None)) && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.mpirun.kill();
        let _ = self.mpirun.wait();
    }
}

/// As [`rank_of_process`](crate::rank_of_process), with this configuration of MPI.
///
/// # Panics
///
/// If the rank fails: its process ends with the error.
pub fn rank_over_mpi<T>(
    config: &MpiConfig,
    program: impl FnOnce(Arc<dyn Communicator>, &Path) -> Result<T, FsepError>,
) -> T {
    rank_of_job(|control, folder| config.run(control, |comm| program(comm, folder)))
}

/// Whether a process got a signal.
fn signal(name: &str, pid: &str) -> bool {
    Command::new("kill").args([&format!("-{name}"), pid]).status().is_ok_and(|status| status.success())
}

/// In a rank: says which process it is.
pub(crate) fn enroll(folder: &Path, rank: usize) {
    fs::write(folder.join(format!("pid-{rank}")), std::process::id().to_string()).expect("a file");
}

/// In a rank: says that it has ended without an error, which mpirun tells of all ranks together only.
pub(crate) fn succeed(folder: &Path, rank: usize) {
    fs::write(folder.join(format!("succeeded-{rank}")), "").expect("a file");
}
