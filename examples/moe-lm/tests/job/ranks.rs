use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use burn_fsep::comm::{TOKEN_VARIABLE, process::JobToken};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

/// How the processes of a job are started, and exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Engine {
    /// By this program, over TCP.
    Tcp,
    /// By mpirun, which lets ranks survive the loss of another, over MPI.
    Mpi,
}

impl Engine {
    fn comm(self) -> &'static str {
        match self {
            Engine::Tcp => "process",
            Engine::Mpi => "mpi",
        }
    }
}

/// The ranks of a job, each a process; killed when dropped.
pub struct Ranks {
    size: usize,
    token: String,
    port: u16,
    /// What each rank says goes to a file here.
    folder: PathBuf,
    /// The ranks by number, or mpirun alone.
    children: Vec<Child>,
    engine: Engine,
}

const PAUSE: Duration = Duration::from_millis(1);

impl Ranks {
    /// Starts `job` as ranks; `folder` takes what they say.
    pub fn start(engine: Engine, size: usize, job: &Command, folder: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        // Free a moment ago: rank 0 binds it itself.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().port();
        // By it, too, the processes of this job are found.
        let token = JobToken::random().unwrap().reveal().to_string();
        let variables =
            [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port.to_string()), (TOKEN_VARIABLE, &token)].map(own);
        let words: Vec<_> = [job.get_program()].into_iter().chain(job.get_args()).collect();
        let start = |mut command: Command, output: &str| {
            let output = File::create(folder.join(output)).unwrap();
            command.envs(variables.clone()).stderr(output.try_clone().unwrap()).stdout(output).spawn().unwrap()
        };
        let children = match engine {
            Engine::Tcp => (0..size)
                .map(|rank| {
                    let mut command = Command::new(words[0]);
                    command.args(&words[1..]).args(["--comm", engine.comm()]);
                    command.envs([("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size)].map(own));
                    start(command, &format!("rank-{rank}.txt"))
                })
                .collect(),
            Engine::Mpi => {
                let mut command = Command::new("mpirun");
                command
                    .args(["-n", &size.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"])
                    .args(["--enable-recovery", "-x", "MASTER_ADDR", "-x", "MASTER_PORT", "-x", TOKEN_VARIABLE])
                    // A file for each rank, which becomes the program itself.
                    .args(["sh", "-c", "exec \"$@\" > \"$0/rank-$OMPI_COMM_WORLD_RANK.txt\" 2>&1"])
                    .arg(folder)
                    .args(words)
                    .args(["--comm", engine.comm()]);
                for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"] {
                    command.env_remove(name);
                }
                vec![start(command, "mpirun.txt")]
            }
        };
        Self { size, token, port, folder: folder.to_path_buf(), children, engine }
    }

    /// What a rank has said.
    pub fn said(&self, rank: usize) -> String {
        let text = fs::read(self.folder.join(format!("rank-{rank}.txt"))).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The process of a rank, if it runs.
    pub fn process(&self, rank: usize) -> Option<u32> {
        match self.engine {
            Engine::Tcp => Some(self.children[rank].id()).filter(|&id| is_alive(id)),
            Engine::Mpi => self.processes().into_iter().find(|&(_, number)| number == Some(rank)).map(|(id, _)| id),
        }
    }

    /// All processes of the job, with their rank if they are one.
    fn processes(&self) -> Vec<(u32, Option<usize>)> {
        let (token, engine) = (format!("{TOKEN_VARIABLE}={}", self.token), self.engine);
        let rank = if engine == Engine::Mpi { "OMPI_COMM_WORLD_RANK=" } else { "RANK=" };
        let process = |entry: fs::DirEntry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let environment = fs::read(entry.path().join("environ")).ok()?;
            let mut variables = environment.split(|&byte| byte == 0).filter_map(|bytes| str::from_utf8(bytes).ok());
            let number = variables.clone().find_map(|variable| variable.strip_prefix(rank)?.parse().ok());
            variables.any(|variable| variable == token).then_some((id, number))
        };
        fs::read_dir("/proc").unwrap().filter_map(|entry| process(entry.unwrap())).collect()
    }

    /// Whether all that this program started has ended.
    pub fn has_ended(&mut self) -> bool {
        self.children.iter_mut().all(|child| child.try_wait().unwrap().is_some())
    }

    /// Waits until all ranks have ended, and mpirun; returns how long that took.
    ///
    /// # Panics
    ///
    /// If they do not within `limit`, or leave a process or a listening socket.
    pub fn wait(&mut self, limit: Duration) -> Duration {
        let start = Instant::now();
        while !self.has_ended() {
            let said = || (0..self.size).map(|rank| format!("rank {rank}: {}\n", self.said(rank))).collect::<String>();
            assert!(start.elapsed() < limit, "processes {:?} still run\n{}", self.processes(), said());
            std::thread::sleep(PAUSE);
        }
        let took = start.elapsed();
        // What others started has ended as well, though it may take its parent a moment to notice.
        while !self.processes().is_empty() {
            assert!(start.elapsed() < took + Duration::from_secs(2), "processes {:?} are left", self.processes());
            std::thread::sleep(PAUSE);
        }
        let listens = TcpListener::bind(("127.0.0.1", self.port)).is_err();
        assert!(!listens, "port {} is in use after the job", self.port);
        took
    }

    /// The exit code of a rank, where the launcher tells.
    pub fn code(&mut self, rank: usize) -> Option<i32> {
        match self.engine {
            Engine::Tcp => self.children[rank].wait().unwrap().code(),
            Engine::Mpi => None,
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for (id, _) in self.processes() {
            kill(id);
        }
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn own<T: ToString>((name, value): (&str, T)) -> (String, String) {
    (name.to_string(), value.to_string())
}

fn is_alive(id: u32) -> bool {
    // A zombie has no environment.
    fs::read(format!("/proc/{id}/environ")).is_ok_and(|variables| !variables.is_empty())
}

/// Kills a process without notice.
pub fn kill(id: u32) {
    // It may be gone.
    let _ = signal::kill(Pid::from_raw(id as i32), Signal::SIGKILL);
}
