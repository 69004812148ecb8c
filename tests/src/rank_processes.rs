use std::{
    fs::{self, File},
    hash::{BuildHasher, Hasher, RandomState},
    net::TcpListener,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use burn_fsep::{comm::process::JobToken, launch::TOKEN_VARIABLE};
use tempfile::TempDir;

/// Tells ranks which folder is their job's.
pub(crate) const FOLDER_VARIABLE: &str = "FSEP_TEST_FOLDER";

const PAUSE: Duration = Duration::from_millis(1);

/// What mpirun gets to end in after its ranks.
const MPIRUN_GRACE: Duration = Duration::from_secs(5);
/// Pause between two looks at all processes, which take time from the ranks.
const MPIRUN_PAUSE: Duration = Duration::from_millis(100);

/// What starts the ranks of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Launcher {
    /// This program, one after the other.
    Direct,
    /// One mpirun, with these options.
    Mpirun(&'static [&'static str]),
}

impl Launcher {
    /// An mpirun that lets ranks survive the loss of another.
    pub const RECOVERING_MPIRUN: Self = Self::Mpirun(&["--enable-recovery"]);

    /// That of the engine which the suite was built for.
    pub const OF_SUITE: Self = if cfg!(feature = "mpi") { Self::RECOVERING_MPIRUN } else { Self::Direct };
}

/// The ranks of a job, each a process; killed when dropped.
#[derive(Debug)]
pub struct RankProcesses {
    launcher: Launcher,
    pub(crate) size: usize,
    port: u16,
    /// By it, too, the processes of this job are found.
    token: String,
    folder: TempDir,
    /// The ranks that were started, by number, or mpirun alone.
    children: Vec<Option<Child>>,
}

impl RankProcesses {
    /// A job of `size` ranks, none of which runs yet.
    ///
    /// # Panics
    ///
    /// If the operating system refuses a port, random numbers or a folder.
    pub fn new(size: usize) -> Self {
        Self::of(Launcher::Direct, size, size)
    }

    fn of(launcher: Launcher, size: usize, children: usize) -> Self {
        let port = free_port();
        let token = JobToken::random().expect("random numbers").reveal().to_string();
        let folder = tempfile::tempdir().expect("a folder");
        Self { launcher, size, port, token, folder, children: (0..children).map(|_| None).collect() }
    }

    /// Starts a command as all ranks of a job. Where mpirun starts them, variables that the command sets are mpirun's.
    ///
    /// # Panics
    ///
    /// If a process cannot be started; as [`new`](Self::new).
    pub fn start(launcher: Launcher, size: usize, command: &Command) -> Self {
        let Launcher::Mpirun(options) = launcher else {
            let mut job = Self::new(size);
            (0..size).for_each(|rank| job.start_rank(rank, command));
            return job;
        };
        let mut job = Self::of(launcher, size, 1);
        let mut mpirun = Command::new("mpirun");
        // mpirun binds ranks to cores, of which they would then have one for all their threads.
        mpirun
            .args(["-n", &size.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"])
            .args(options)
            .args(job.variables().iter().flat_map(|(name, _)| ["-x", name]))
            // A file for each rank, which becomes the program itself.
            .args(["sh", "-c", &format!("exec \"$@\" > \"${FOLDER_VARIABLE}/rank-$OMPI_COMM_WORLD_RANK.txt\" 2>&1")])
            .args(["rank".as_ref(), command.get_program()])
            .args(command.get_args());
        for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"] {
            mpirun.env_remove(name);
        }
        job.children[0] = Some(job.spawn(mpirun, command, "mpirun"));
        job
    }

    /// Starts a command as one rank; variables that the command sets replace those of the job.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start_rank(&mut self, rank: usize, command: &Command) {
        let mut process = Command::new(command.get_program());
        process
            .args(command.get_args())
            .envs([("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", self.size)].map(|(k, v)| (k, v.to_string())));
        self.children[rank] = Some(self.spawn(process, command, &format!("rank-{rank}")));
    }

    fn spawn(&self, mut process: Command, command: &Command, output: &str) -> Child {
        let output = File::create(self.folder().join(output).with_extension("txt")).expect("a file for the output");
        process.envs(self.variables());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => process.env(name, value),
                None => process.env_remove(name),
            };
        }
        process.stderr(output.try_clone().expect("a file")).stdout(output);
        process.spawn().unwrap_or_else(|error| panic!("{process:?} (mpirun: Debian's openmpi-bin): {error}"))
    }

    /// Variables that every rank gets.
    fn variables(&self) -> [(&'static str, String); 4] {
        let folder = self.folder().to_str().expect("a folder with a plain name").to_string();
        [
            ("MASTER_ADDR", "127.0.0.1".to_string()),
            ("MASTER_PORT", self.port.to_string()),
            (TOKEN_VARIABLE, self.token.clone()),
            (FOLDER_VARIABLE, folder),
        ]
    }

    /// The folder for what ranks say and leave.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where rank 0 listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What a rank has said so far.
    pub fn said(&self, rank: usize) -> String {
        self.text(&format!("rank-{rank}.txt"))
    }

    /// What all have said so far, also mpirun.
    pub fn all_said(&self) -> String {
        let ranks = (0..self.size).map(|rank| format!("rank {rank}: {}\n", self.said(rank)));
        ranks.collect::<String>() + &self.text("mpirun.txt")
    }

    fn text(&self, file: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.folder().join(file)).unwrap_or_default()).into_owned()
    }

    /// The process of a rank, if it runs.
    ///
    /// # Panics
    ///
    /// If the operating system does not tell.
    pub fn process(&mut self, rank: usize) -> Option<u32> {
        if self.launcher != Launcher::Direct {
            return self.processes().into_iter().find(|&(_, number)| number == Some(rank)).map(|(id, _)| id);
        }
        let child = self.children[rank].as_mut()?;
        child.try_wait().expect("a child").is_none().then(|| child.id())
    }

    /// All processes of the job, with their rank if they are one. Linux tells; elsewhere there are none.
    fn processes(&self) -> Vec<(u32, Option<usize>)> {
        let token = format!("{TOKEN_VARIABLE}={}", self.token);
        let rank = if self.launcher == Launcher::Direct { "RANK=" } else { "OMPI_COMM_WORLD_RANK=" };
        let process = |entry: fs::DirEntry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            // A zombie has no environment.
            let environment = fs::read(entry.path().join("environ")).ok()?;
            let mut variables = environment.split(|&byte| byte == 0).filter_map(|bytes| str::from_utf8(bytes).ok());
            let number = variables.clone().find_map(|variable| variable.strip_prefix(rank)?.parse().ok());
            variables.any(|variable| variable == token).then_some((id, number))
        };
        fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(process).collect()
    }

    /// Kills a rank without notice. `false` if it does not run.
    ///
    /// # Panics
    ///
    /// If the operating system refuses it.
    pub fn kill(&mut self, rank: usize) -> bool {
        let Some(id) = self.process(rank) else { return false };
        match self.launcher {
            Launcher::Direct => self.children[rank].as_mut().expect("it runs").kill().expect("a child"),
            Launcher::Mpirun(_) => kill(&[id]),
        }
        true
    }

    /// Whether all that this program started has ended.
    ///
    /// # Panics
    ///
    /// If the operating system does not tell.
    pub fn has_ended(&mut self) -> bool {
        self.children.iter_mut().flatten().all(|child| child.try_wait().expect("a child").is_some())
    }

    /// Waits until a rank has said these words.
    ///
    /// # Panics
    ///
    /// If it does not within `limit`.
    pub fn wait_for(&mut self, rank: usize, words: &str, limit: Duration) {
        let start = Instant::now();
        loop {
            let is_over = self.has_ended() || start.elapsed() > limit;
            if self.said(rank).contains(words) {
                return;
            }
            assert!(!is_over, "rank {rank} does not say `{words}`\n{}", self.all_said());
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until a rank has ended; its exit code, as [`code`](Self::code).
    ///
    /// # Panics
    ///
    /// If it does not within `limit`.
    pub fn end(&mut self, rank: usize, limit: Duration) -> Option<i32> {
        let start = Instant::now();
        while self.process(rank).is_some() {
            assert!(start.elapsed() < limit, "rank {rank} still runs after {limit:?}\n{}", self.all_said());
            std::thread::sleep(PAUSE);
        }
        self.code(rank)
    }

    /// Waits until all ranks have ended, and mpirun; returns how long that took.
    ///
    /// An mpirun that does not end after its ranks is killed: that of Open MPI 4.1 sometimes hangs (`PMIX ERROR`) if a rank is lost
    /// while MPI starts.
    ///
    /// # Panics
    ///
    /// If they do not within `limit`, or leave a process.
    pub fn wait(&mut self, limit: Duration) -> Duration {
        let start = Instant::now();
        let (mut ranks_took, mut next_look) = (None, MPIRUN_PAUSE);
        while !self.has_ended() {
            let took = start.elapsed();
            if self.launcher != Launcher::Direct && took >= next_look {
                next_look = took + MPIRUN_PAUSE;
                if ranks_took.is_none() && self.ranks_have_ended() {
                    ranks_took = Some(took);
                }
                if ranks_took.is_some_and(|ranks_took| took - ranks_took > MPIRUN_GRACE) {
                    eprintln!("mpirun still runs after its ranks: killed\n{}", self.text("mpirun.txt"));
                    self.children.iter_mut().flatten().for_each(|mpirun| mpirun.kill().expect("a child"));
                }
            }
            let still = || format!("processes {:?} still run after {limit:?}", self.processes());
            assert!(took < limit, "{}\n{}", still(), self.all_said());
            std::thread::sleep(PAUSE);
        }
        let took = ranks_took.unwrap_or_else(|| start.elapsed());
        // What others started has ended as well, though it may take its parent a moment to notice.
        let ended = Instant::now();
        while !self.processes().is_empty() {
            assert!(ended.elapsed() < Duration::from_secs(2), "processes {:?} are left", self.processes());
            std::thread::sleep(PAUSE);
        }
        took
    }

    /// Whether mpirun has started all ranks, and none runs any more.
    fn ranks_have_ended(&self) -> bool {
        let has_started = |rank| self.folder().join(format!("rank-{rank}.txt")).exists();
        (0..self.size).all(has_started) && self.processes().iter().all(|(_, rank)| rank.is_none())
    }

    /// The exit code of a rank that has ended; `None` if a signal ended it, or mpirun started it, which does not tell.
    ///
    /// # Panics
    ///
    /// If the operating system does not tell.
    pub fn code(&mut self, rank: usize) -> Option<i32> {
        if self.launcher == Launcher::Direct { self.code_of_child(rank) } else { None }
    }

    /// The exit code of an mpirun that has ended, and what it said itself.
    ///
    /// # Panics
    ///
    /// If another launcher started the ranks.
    pub fn mpirun(&mut self) -> (Option<i32>, String) {
        assert!(self.launcher != Launcher::Direct, "these ranks have no mpirun");
        (self.code_of_child(0), self.text("mpirun.txt"))
    }

    fn code_of_child(&mut self, child: usize) -> Option<i32> {
        self.children[child].as_mut()?.try_wait().expect("a child")?.code()
    }
}

impl Drop for RankProcesses {
    fn drop(&mut self) {
        let ids: Vec<u32> = self.processes().into_iter().map(|(id, _)| id).collect();
        if !ids.is_empty() {
            kill(&ids);
        }
        for child in self.children.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A port that was free a moment ago, which is as good as it gets: rank 0 binds it itself. Below those that the system gives to
/// whoever asks for any, such as the other ranks.
fn free_port() -> u16 {
    loop {
        let port = 20_000 + (RandomState::new().build_hasher().finish() % 12_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Kills processes without notice; they may be gone.
fn kill(ids: &[u32]) {
    let _ = Command::new("kill").arg("-KILL").args(ids.iter().map(u32::to_string)).status();
}
