use std::{fmt, process::ExitCode, time::Duration};

use derive_new::new;

#[cfg(doc)]
use super::RankEnvironment;
use super::{Engine, LaunchError, Rank, RankDevice, Ranks, RunError};

/// How this process becomes a rank of a job, or all ranks as threads; equal on all ranks.
///
/// Whether a launcher started this process, and as which rank, is read from the environment; see [`RankEnvironment`].
#[derive(new, Debug, Clone)]
pub struct RankConfig {
    /// World size `N` where no launcher started this process: ranks are threads.
    #[new(value = "1")]
    pub threads: usize,
    /// What carries data between ranks.
    #[new(default)]
    pub engine: Engine,
    /// What ranks compute on.
    #[new(default)]
    pub device: RankDevice,
    /// How long a collective waits for its peers.
    #[new(value = "Duration::from_secs(30)")]
    pub timeout: Duration,
    /// How long processes wait for each other at the start.
    #[new(value = "Duration::from_secs(30)")]
    pub rendezvous_timeout: Duration,
    /// Whether each rank has a timeline, [`Rank::timeline`].
    #[new(default)]
    pub timeline: bool,
}

impl Default for RankConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl RankConfig {
    /// Sets how many ranks there are, as threads, where no launcher started this process (1 by default). A launcher says
    /// itself how many there are.
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Sets what carries data between ranks ([`Engine::Auto`] by default).
    pub fn with_engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// Sets what ranks compute on ([`RankDevice::Auto`] by default).
    pub fn with_device(mut self, device: RankDevice) -> Self {
        self.device = device;
        self
    }

    /// Sets how long a collective waits for its peers (30 s by default); [`Duration::MAX`] is for ever.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets how long processes wait for each other at the start (30 s by default); raise it where a scheduler starts them
    /// far apart.
    pub fn with_rendezvous_timeout(mut self, timeout: Duration) -> Self {
        self.rendezvous_timeout = timeout;
        self
    }

    /// Sets whether each rank has a timeline (not by default), which also records its exchanges between GPUs.
    pub fn with_timeline(mut self, timeline: bool) -> Self {
        self.timeline = timeline;
        self
    }

    /// What this process is in its job. Nothing is started and nobody is met yet.
    ///
    /// # Errors
    ///
    /// [`LaunchError`] if the environment makes no rank, it and this configuration contradict each other, or a device is
    /// missing.
    pub fn init(&self) -> Result<Ranks, LaunchError> {
        self.init_from(|variable| std::env::var(variable).ok())
    }

    /// [`init`](Self::init) with the environment that `lookup` gives.
    pub(super) fn init_from(&self, lookup: impl Fn(&str) -> Option<String>) -> Result<Ranks, LaunchError> {
        if self.threads == 0 {
            return Err(LaunchError::Config("a job has at least one rank, but 0 threads are configured".into()));
        }
        let environment = self.engine.environment(&lookup)?;
        let places = match &environment {
            Some(environment) => {
                // The one thing that only its use would show.
                environment.process_config()?;
                environment.local_rank..environment.local_rank + 1
            }
            None => 0..self.threads,
        };
        let numbered = if environment.is_some() { "the rank with local rank" } else { "rank" };
        let devices = places.map(|place| self.device.of(place, numbered)).collect::<Result<Vec<_>, _>>()?;
        let world_size = environment.as_ref().map_or(self.threads, |environment| environment.world_size);
        let transport = self.engine.transport(world_size, &self.device, &devices)?;
        Ok(Ranks { config: self.clone(), environment, devices, transport })
    }

    /// Runs `program` as each rank in this process; [`init`](Self::init) and [`Ranks::run`].
    ///
    /// # Errors
    ///
    /// Those of both.
    pub fn run<T, E>(&self, program: impl Fn(Rank) -> Result<T, E> + Sync) -> Result<T, RunError<E>>
    where
        T: Send,
        E: fmt::Display + Send,
    {
        self.init()?.run(program)
    }

    /// As [`run`](Self::run), for `main`: an error is printed, once in the job, and the exit code is 1.
    pub fn main<E: fmt::Display + Send>(&self, program: impl Fn(Rank) -> Result<(), E> + Sync) -> ExitCode {
        match self.run(program) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => error.report(),
        }
    }
}
