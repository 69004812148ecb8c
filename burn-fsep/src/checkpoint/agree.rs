//! How ranks save and load together: all of them do, or none.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use super::CheckpointError;
use crate::comm::{Communicator, Operation, all_gather_u64};

/// How long a rank waits for its own thread before it meets the others again.
const ROUND: Duration = Duration::from_millis(100);
/// The longest message of an error that goes to other ranks.
const MAX_MESSAGE: usize = 2000;

/// The result of all ranks: this rank's if all succeeded. Collective.
///
/// All ranks return an error if one has one, and all of the same kind: damage only if nothing else is wrong.
pub(super) fn agree<T>(
    comm: &dyn Communicator,
    operation: Operation,
    result: Result<T, CheckpointError>,
) -> Result<T, CheckpointError> {
    let mut message = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let mut end = message.len().min(MAX_MESSAGE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message.truncate(end);
    let kind = match &result {
        Ok(_) => 0,
        Err(error) if error.is_damage() => 1,
        Err(_) => 2,
    };
    // Both numbers are equally meaningful to all ranks only after this, hence two messages.
    let all = match all_gather_u64(comm, operation, &[kind, message.len() as u64]) {
        Ok(all) => all,
        Err(lost) => return Err(result.err().unwrap_or(lost.into())),
    };
    let worst = all.iter().step_by(2).copied().max().unwrap_or(0);
    if worst == 0 {
        return result;
    }
    let longest = all.iter().skip(1).step_by(2).copied().max().unwrap_or(0) as usize;
    let mut send = message.into_bytes();
    send.resize(longest, 0);
    let mut messages = vec![0; longest * comm.size()];
    let told = comm.all_gather(operation, &send, &mut messages);
    if kind == worst
        && let Err(error) = result
    {
        return Err(error);
    }
    told?;
    let rank = all.iter().step_by(2).position(|&kind| kind == worst).unwrap_or(0);
    let len = all[2 * rank + 1] as usize;
    let message = String::from_utf8_lossy(&messages[rank * longest..rank * longest + len]).into_owned();
    Err(CheckpointError::Peer { rank, message, damaged: worst == 1 })
}

/// Work with files on a thread of its own.
#[derive(Debug)]
pub(super) struct Work<T> {
    results: Receiver<Result<T, CheckpointError>>,
    done: Option<Result<T, CheckpointError>>,
}

impl<T: Send + 'static> Work<T> {
    pub fn start(work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static) -> Self {
        let (sender, results) = channel();
        let spawned = thread::Builder::new().name("checkpoint".into()).spawn(move || {
            // Nobody waits any more if the training ended with an error.
            let _ = sender.send(work());
        });
        let done = spawned.err().map(|error| Err(CheckpointError::Panicked(format!("no thread: {error}"))));
        Self { results, done }
    }

    fn is_done(&mut self, wait: Duration) -> bool {
        if self.done.is_none() {
            self.done = match self.results.recv_timeout(wait) {
                Ok(result) => Some(result),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => {
                    Some(Err(CheckpointError::Panicked("see the message above".into())))
                }
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
    ) -> Result<bool, CheckpointError> {
        let done = all_gather_u64(comm, operation, &[u64::from(self.is_done(wait))])?;
        Ok(done.iter().all(|&done| done == 1))
    }

    /// Waits for the work of all ranks and [`agree`]s on its result. Collective.
    ///
    /// Disks differ in speed by more than any timeout for collectives, so ranks that are done keep meeting the others.
    pub fn finish(mut self, comm: &dyn Communicator, operation: Operation) -> Result<T, CheckpointError> {
        while !self.is_done_everywhere(comm, operation, ROUND)? {}
        let result = self.done.unwrap_or_else(|| unreachable!("the loop ends when the work is done"));
        agree(comm, operation, result)
    }
}

/// Rank 0's text on all ranks. Collective.
pub(super) fn broadcast_text(
    comm: &dyn Communicator,
    operation: Operation,
    text: String,
) -> Result<String, CheckpointError> {
    let len = all_gather_u64(comm, operation, &[text.len() as u64])?[0] as usize;
    let mut bytes = text.into_bytes();
    bytes.resize(len, 0);
    comm.broadcast(operation, &mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
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
            Ok(agree(comm.as_ref(), OP, results[comm.rank()]()))
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
            let work = Work::start(move || {
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
