use std::{
    io::{self, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::{Handle, Signals},
};

use super::{LauncherError, error::system, output::Output};

/// What happens to a job.
enum Event {
    /// A rank's process has ended and can be asked how.
    Ended(usize),
    /// This process got a signal.
    Signal(i32),
}

/// The ranks that were started. Dropping it kills those that still run.
pub(super) struct Job {
    /// By rank; `None` once it has ended.
    running: Vec<Option<Child>>,
    grace: Duration,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    signals: Handle,
    output: Output,
}

impl Job {
    pub fn new(grace: Duration) -> Result<Self, LauncherError> {
        let (sender, events) = mpsc::channel();
        // What was started to be deaf to a signal (`nohup`, `&` in a script) stays so, and its ranks with it.
        let heard = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_ignored(*signal));
        let mut signals = Signals::new(heard).map_err(system("handlers for signals"))?;
        let handle = signals.handle();
        let sends = sender.clone();
        let forward = move || signals.forever().for_each(|signal| drop(sends.send(Event::Signal(signal))));
        thread::Builder::new().name("signals".into()).spawn(forward).map_err(system("a thread for signals"))?;
        Ok(Self { running: Vec::new(), grace, events, sender, signals: handle, output: Output::new() })
    }

    /// Starts the next rank.
    pub fn start(&mut self, rank: usize, mut command: Command) -> io::Result<()> {
        let mut child = command.spawn()?;
        let (pid, out, err) = (pid_of(&child), child.stdout.take(), child.stderr.take());
        self.running.push(Some(child));
        if let (Some(out), Some(err)) = (out, err) {
            self.output.forward(rank, out, io::stdout())?;
            self.output.forward(rank, err, io::stderr())?;
        }
        let sender = self.sender.clone();
        let watch = move || {
            // The process stays a zombie until the job has dealt with its group, whose number is not reused as long.
            while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
            let _ = sender.send(Event::Ended(rank));
        };
        thread::Builder::new().name(format!("rank-{rank}")).spawn(watch).map(drop)
    }

    /// Waits until all ranks have ended; returns the job's exit code.
    pub fn wait(mut self) -> u8 {
        let mut code = None;
        // When the remaining ranks are killed.
        let mut deadline: Option<Instant> = None;
        let mut signalled = None;
        while self.running.iter().any(Option::is_some) {
            let event = match deadline {
                Some(deadline) => self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())),
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(Event::Ended(rank)) => {
                    let Some(failure) = self.reap(rank) else { continue };
                    if code.is_none() {
                        code = Some(failure.code);
                        deadline = deadline.or_else(|| Instant::now().checked_add(self.grace));
                        // Of a rank that ended as it was told there is nothing to say.
                        if signalled.is_some_and(|signal: i32| failure.code == 128 + signal as u8) {
                            continue;
                        }
                        report(&format!("rank {rank} {}", failure.reason));
                        if self.running.iter().any(Option::is_some) {
                            report(&format!("the other ranks have {:?} to end by themselves", self.grace));
                        }
                    }
                }
                // Whoever asks twice does not want to wait.
                Ok(Event::Signal(_)) if signalled.is_some() => self.kill(Signal::SIGKILL),
                Ok(Event::Signal(signal)) => {
                    signalled = Some(signal);
                    deadline = deadline.or_else(|| Instant::now().checked_add(self.grace));
                    if let Ok(signal) = Signal::try_from(signal) {
                        report(&format!("{signal}: passed on to the ranks, which have {:?} to end", self.grace));
                        self.kill(signal);
                    }
                }
                Err(_) => {
                    report(&format!("rank(s) {:?} did not end by themselves and are killed", self.alive()));
                    code = code.or(Some(128 + SIGTERM as u8));
                    self.kill(Signal::SIGKILL);
                    deadline = None;
                }
            }
        }
        self.output.finish();
        code.unwrap_or(0)
    }

    fn alive(&self) -> Vec<usize> {
        (0..self.running.len()).filter(|&rank| self.running[rank].is_some()).collect()
    }

    fn kill(&self, signal: Signal) {
        for child in self.running.iter().flatten() {
            let _ = killpg(pid_of(child), signal);
        }
    }

    /// Ends what a rank left behind; returns how it failed, if it did.
    fn reap(&mut self, rank: usize) -> Option<Failure> {
        let mut child = self.running[rank].take()?;
        let _ = killpg(pid_of(&child), Signal::SIGKILL);
        match child.wait() {
            Ok(status) => Failure::of(status),
            Err(error) => Some(Failure { code: 1, reason: format!("cannot be waited for: {error}") }),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill(Signal::SIGKILL);
        for rank in self.alive() {
            self.reap(rank);
        }
        self.signals.close();
    }
}

struct Failure {
    code: u8,
    reason: String,
}

impl Failure {
    fn of(status: ExitStatus) -> Option<Self> {
        match (status.code(), status.signal()) {
            (Some(0), _) => None,
            (Some(code), _) => Some(Self { code: code as u8, reason: format!("ended with exit code {code}") }),
            (None, Some(signal)) => {
                let name = Signal::try_from(signal).map_or("a signal", Signal::as_str);
                Some(Self { code: 128 + signal as u8, reason: format!("was killed by {name} ({signal})") })
            }
            (None, None) => Some(Self { code: 1, reason: "ended without a status".into() }),
        }
    }
}

/// Whether this process ignores a signal. Linux tells; elsewhere it is taken not to.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    ignored & 1 << (signal - 1) != 0
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

fn report(message: &str) {
    // Nobody may listen any more.
    let _ = writeln!(io::stderr(), "fsep-launch: {message}");
}

/// Lets the process die with the thread that starts it, so that no rank outlives a launcher that was killed.
pub(super) fn die_with_this_thread(command: &mut Command) {
    #[cfg(target_os = "linux")]
    {
        let launcher = nix::unistd::getpid();
        let set = move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The launcher may have died before.
            if nix::unistd::getppid() != launcher {
                return Err(io::ErrorKind::NotFound.into());
            }
            Ok(())
        };
        // SAFETY: only system calls, which are safe between fork and exec, and no allocation.
        unsafe { command.pre_exec(set) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = command;
}
