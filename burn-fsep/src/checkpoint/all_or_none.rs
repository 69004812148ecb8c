//! How ranks save and load together: all of them do, or none.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use super::CheckpointError;
use crate::comm::{CommError, Communicator, Operation, all_gather_u64};

/// An error that all ranks are to have if one has it.
pub(crate) trait SharedError: std::fmt::Display + From<CommError> + Send + 'static {
    /// From 1: of several ranks' errors the worst counts.
    fn severity(&self) -> u8;

    /// The error of a rank as the others have it.
    fn of_peer(rank: usize, message: String, severity: u8) -> Self;

    /// A thread that worked for the rank panicked.
    fn panicked(reason: String) -> Self;
}

impl SharedError for CheckpointError {
    /// Damage is the least: an older checkpoint may be whole.
    fn severity(&self) -> u8 {
        if self.is_damage() { 1 } else { 2 }
    }

    fn of_peer(rank: usize, message: String, severity: u8) -> Self {
        Self::Peer { rank, message, damaged: severity == 1 }
    }

    fn panicked(reason: String) -> Self {
        Self::Panicked(reason)
    }
}

/// How long a rank waits for its own thread before it meets the others again.
const ROUND: Duration = Duration::from_millis(100);
/// The longest message of an error that goes to other ranks.
const MAX_MESSAGE: usize = 2000;

/// Every rank's bytes, of whatever length. Collective.
pub(crate) fn gather(comm: &dyn Communicator, operation: Operation, ours: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
    let lens = all_gather_u64(comm, operation, &[ours.len() as u64])?;
    let longest = lens.iter().copied().max().unwrap_or(0) as usize;
    if longest == 0 {
        return Ok(vec![Vec::new(); comm.size()]);
    }
    let mut send = ours.to_vec();
    send.resize(longest, 0);
    let mut all = vec![0; longest * comm.size()];
    comm.all_gather(operation, &send, &mut all)?;
    Ok(all.chunks_exact(longest).zip(lens).map(|(bytes, len)| bytes[..len as usize].to_vec()).collect())
}

/// The result of all ranks: this rank's if all succeeded. Collective.
///
/// All ranks return an error if one has one, and all of the same kind: damage only if nothing else is wrong.
pub(crate) fn all_or_none<T, E: SharedError>(
    comm: &dyn Communicator,
    operation: Operation,
    result: Result<T, E>,
) -> Result<T, E> {
    // Of an error its kind, greater if it is worse, and its message.
    let mut ours = Vec::new();
    if let Err(error) = &result {
        let message = error.to_string();
        ours.push(error.severity());
        ours.extend_from_slice(&message.as_bytes()[..message.floor_char_boundary(MAX_MESSAGE)]);
    }
    let kind = ours.first().copied();
    let all = match gather(comm, operation, &ours) {
        Ok(all) => all,
        Err(lost) => return Err(result.err().unwrap_or(lost.into())),
    };
    let Some(worst) = all.iter().filter_map(|theirs| theirs.first().copied()).max() else { return result };
    if kind == Some(worst)
        && let Err(error) = result
    {
        return Err(error);
    }
    let rank = all.iter().position(|theirs| theirs.first() == Some(&worst)).unwrap_or(0);
    let message = String::from_utf8_lossy(&all[rank][1..]).into_owned();
    Err(E::of_peer(rank, message, worst))
}

/// Work with files on a thread of its own.
#[derive(Debug)]
pub(crate) struct Work<T, E = CheckpointError> {
    results: Receiver<Result<T, E>>,
    done: Option<Result<T, E>>,
}

impl<T: Send + 'static, E: SharedError> Work<T, E> {
    pub fn start(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Self {
        let (sender, results) = channel();
        let spawned = thread::Builder::new().name("checkpoint".into()).spawn(move || {
            // Nobody waits any more if the training ended with an error.
            let _ = sender.send(work());
        });
        let done = spawned.err().map(|error| Err(E::panicked(format!("no thread: {error}"))));
        Self { results, done }
    }

    fn is_done(&mut self, wait: Duration) -> bool {
        if self.done.is_none() {
            self.done = match self.results.recv_timeout(wait) {
                Ok(result) => Some(result),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Err(E::panicked("see the message above".into()))),
            };
        }
        self.done.is_some()
    }

    /// Whether the work of all ranks is done. Collective.
    pub fn is_done_everywhere(
        &mut self,
        comm: &dyn Communicator,
        operation: Operation,
        wait: Duration,
    ) -> Result<bool, E> {
        let done = all_gather_u64(comm, operation, &[u64::from(self.is_done(wait))])?;
        Ok(done.iter().all(|&done| done == 1))
    }

    /// Waits for the work of all ranks and makes of it one result for [`all_or_none`]. Collective.
    ///
    /// Disks differ in speed by more than any timeout for collectives, so ranks that are done keep meeting the others.
    pub fn finish(mut self, comm: &dyn Communicator, operation: Operation) -> Result<T, E> {
        while !self.is_done_everywhere(comm, operation, ROUND)? {}
        let result = self.done.unwrap_or_else(|| unreachable!("the loop ends when the work is done"));
        all_or_none(comm, operation, result)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::comm::local::{LaunchConfig, launch};

    const OP: Operation = Operation::new("test");

    /// What three ranks make of their results.
    fn outcomes(results: [fn() -> Result<u8, CheckpointError>; 3]) -> Vec<Result<u8, CheckpointError>> {
        let ranks = launch(&LaunchConfig::new(3), |comm| -> Result<_, CheckpointError> {
            Ok(all_or_none(comm.as_ref(), OP, results[comm.rank()]()))
        });
        ranks.into_iter().map(Result::unwrap).collect()
    }

    fn damaged() -> Result<u8, CheckpointError> {
        Err(CheckpointError::damaged(Path::new("x"), "é".repeat(5000)))
    }

    fn config() -> Result<u8, CheckpointError> {
        Err(CheckpointError::Config("no".into()))
    }

    #[test]
    fn one_error_is_everybodys() {
        assert!(outcomes([|| Ok(1), || Ok(1), || Ok(1)]).iter().all(|result| *result == Ok(1)));
        let outcome = outcomes([|| Ok(1), damaged, || Ok(1)]);
        assert_eq!(outcome[1], damaged());
        assert!(matches!(&outcome[0], Err(CheckpointError::Peer { rank: 1, message, damaged: true })
            if message.starts_with("x is damaged") && message.len() <= MAX_MESSAGE));
    }

    #[test]
    fn all_ranks_agree_on_the_kind_of_error() {
        for error in outcomes([damaged, config, || Ok(1)]).into_iter().map(Result::unwrap_err) {
            assert!(!error.is_damage(), "{error}");
            assert!(error.to_string().contains("invalid checkpoint configuration: no"), "{error}");
        }
    }

    #[test]
    fn slow_work_is_waited_for_longer_than_a_collective() {
        let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(2));
        let ranks = launch(&config, |comm| {
            let rank = comm.rank();
            let work: Work<_, CheckpointError> = Work::start(move || {
                thread::sleep(Duration::from_secs(5 * rank as u64));
                Ok(rank)
            });
            work.finish(comm.as_ref(), OP)
        });
        assert_eq!(ranks.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [0, 1]);
        let ranks = launch(&config, |comm| {
            let rank = comm.rank();
            let work: Work<()> = Work::start(move || if rank == 1 { panic!("of the test") } else { Ok(()) });
            Ok::<_, CheckpointError>(work.finish(comm.as_ref(), OP).unwrap_err().to_string())
        });
        assert!(ranks.into_iter().all(|error| error.unwrap().contains("panicked")));
    }
}
