use std::{
    ffi::OsString,
    net::{Ipv4Addr, TcpListener},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

use super::{
    LauncherError,
    error::system,
    job::{self, Job},
};
use crate::{comm::process::JobToken, launch::TOKEN_VARIABLE};

/// Variables of other launchers, which would contradict this one's.
const FOREIGN: [&str; 6] = [
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
];

/// A program to be started as ranks on this machine.
///
/// Each rank gets the variables that [`RankEnvironment`](crate::launch::RankEnvironment) reads, nothing on its standard input,
/// and a process group of its own; what it prints comes out with `[rank r]` before each line.
#[derive(Debug, Clone)]
pub struct LauncherConfig {
    ranks: usize,
    program: OsString,
    args: Vec<OsString>,
    master_port: Option<u16>,
    grace: Duration,
}

impl LauncherConfig {
    /// `ranks` processes of `program`.
    pub fn new(ranks: usize, program: impl Into<OsString>) -> Self {
        Self { ranks, program: program.into(), args: Vec::new(), master_port: None, grace: Duration::from_secs(35) }
    }

    /// Sets the program's arguments.
    pub fn with_args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the port at which rank 0 listens on 127.0.0.1; a free one by default.
    pub fn with_master_port(mut self, port: Option<u16>) -> Self {
        self.master_port = port;
        self
    }

    /// Sets how long the other ranks may go on when one has failed, so that they can end with an error of their own (35 s by
    /// default: a collective's timeout and a bit). Then they are killed.
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Starts the ranks and waits for them; SIGINT, SIGTERM and SIGHUP are passed on, unless this process ignores them (`nohup`).
    /// They do nothing else in this process from then on, also after the return. Returns the exit code of the first rank
    /// that failed, 128 + the signal if one killed it, and 0 if none failed.
    ///
    /// No process of the job is left behind, however this one ends: on Linux the ranks die with the thread that calls this.
    /// What ranks themselves start is killed with them, except where this process is killed by force.
    ///
    /// # Errors
    ///
    /// [`LauncherError`], if the job could not be started.
    pub fn run(&self) -> Result<u8, LauncherError> {
        if self.ranks == 0 {
            return Err(LauncherError::NoRanks);
        }
        let port = match self.master_port {
            Some(port) => port,
            None => free_port().map_err(system("a free port for rank 0"))?,
        };
        let token = JobToken::random().map_err(system("random numbers for the job token"))?;
        let mut job = Job::new(self.grace)?;
        for rank in 0..self.ranks {
            let start = |error| LauncherError::Start { rank, program: self.program.display().to_string(), error };
            job.start(rank, self.command(rank, port, &token)).map_err(start)?;
        }
        Ok(job.wait())
    }

    fn command(&self, rank: usize, port: u16, token: &JobToken) -> Command {
        let mut command = Command::new(&self.program);
        let (rank, ranks) = (rank.to_string(), self.ranks.to_string());
        command.args(&self.args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for variable in FOREIGN {
            command.env_remove(variable);
        }
        command
            .envs([("RANK", &rank), ("LOCAL_RANK", &rank), ("WORLD_SIZE", &ranks), ("LOCAL_WORLD_SIZE", &ranks)])
            .envs([("MASTER_ADDR", "127.0.0.1".into()), ("MASTER_PORT", port.to_string())])
            .env(TOKEN_VARIABLE, token.reveal())
            .process_group(0);
        job::die_with_this_thread(&mut command);
        command
    }
}

/// Free now; should another process be faster than rank 0, rank 0 says so.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
