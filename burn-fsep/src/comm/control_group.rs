//! What engines have in common whose library cannot say which rank was lost: a second group over the same ranks that can.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{CommError, Communicator, Operation, agree, error::invalid_argument};

/// A rank's view of its group: a communicator that carries failures, and the failure that ended the group.
pub(super) struct ControlGroup {
    pub comm: Arc<dyn Communicator>,
    /// How long a collective of the engine waits for its peers.
    pub timeout: Duration,
    /// One for all groups that were split off from each other, as theirs of the control communicators is.
    failure: Arc<Mutex<Option<CommError>>>,
}

impl fmt::Debug for ControlGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "control group {:?}", self.comm)
    }
}

impl ControlGroup {
    pub fn new(comm: Arc<dyn Communicator>, timeout: Duration) -> Self {
        Self { comm, timeout, failure: Arc::default() }
    }

    /// That of this rank's group in a split; see [`Communicator::split`]. Collective.
    pub fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Self, CommError> {
        let comm = self.comm.split(name, color, key)?;
        Ok(Self { comm, timeout: self.timeout, failure: self.failure.clone() })
    }

    /// This rank's number in the world, by which errors name it.
    pub fn world_rank(&self) -> usize {
        self.comm.world_rank(self.comm.rank())
    }

    /// Ranks of which only some compare signatures would wait for each other. Collective.
    pub fn check_config(&self, operation: Operation, check_signatures: bool) -> Result<(), CommError> {
        match agree(self.comm.as_ref(), operation, &[("check_signatures", u64::from(check_signatures))])? {
            None => Ok(()),
            Some(difference) => Err(self.fail(invalid_argument(operation, difference.to_string()))),
        }
    }

    /// The group's failure as a rank in `operation` sees it.
    pub fn check(&self, operation: Operation) -> Result<(), CommError> {
        match self.failure() {
            Some(failure) => Err(failure.seen_from(&operation.to_string())),
            None => Ok(()),
        }
    }

    pub fn failure(&self) -> Option<CommError> {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            *failure = self.comm.failure();
        }
        failure.clone()
    }

    /// Ends the group on all ranks because of an error of this one; returns the error.
    pub fn fail(&self, error: CommError) -> CommError {
        if self.comm.failure().is_none() {
            self.comm.abort(&error.to_string());
        }
        self.failure.lock().get_or_insert_with(|| error.clone());
        error
    }

    /// Asks `is_done` until it is, the group has failed, or the time is over: then the group's ranks that are `missing` are named.
    pub fn poll(
        &self,
        operation: Operation,
        mut is_done: impl FnMut() -> Result<bool, CommError>,
        missing: impl Fn() -> Vec<usize>,
    ) -> Result<(), CommError> {
        let start = Instant::now();
        loop {
            // First: what has come is taken, whatever has happened to its sender since.
            if is_done().map_err(|error| self.fail(error))? {
                return Ok(());
            }
            self.check(operation)?;
            let waited = start.elapsed();
            if waited > self.timeout {
                return Err(self.fail(self.timed_out(operation, missing())));
            }
            // Counts take some tens of microseconds; whoever waits longer shall not take a core from others.
            if waited < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Ranks of the group did not come.
    pub fn timed_out(&self, operation: Operation, missing: Vec<usize>) -> CommError {
        let mut missing: Vec<_> = missing.into_iter().map(|rank| self.comm.world_rank(rank)).collect();
        missing.sort_unstable();
        CommError::Timeout { operation: operation.to_string(), waited: self.timeout, missing, meanwhile: None }
    }

    /// This rank and the group's rank `peer` do different things.
    pub fn mismatch(&self, sequence: u64, peer: usize, texts: [String; 2]) -> CommError {
        CommError::mismatch(sequence, self.world_rank(), self.comm.world_rank(peer), texts)
    }
}

/// The library or device that carries the group failed.
pub(super) fn engine_error(operation: Operation, reason: String) -> CommError {
    CommError::Engine { operation: operation.to_string(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::{LaunchConfig, launch};

    #[test]
    fn ranks_that_compare_signatures_and_ranks_that_do_not_are_told() {
        let results = launch(&LaunchConfig::new(3), |comm| {
            let compares = comm.rank() != 2;
            ControlGroup::new(comm, Duration::from_secs(9)).check_config(Operation::new("start"), compares)
        });
        for result in results {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("ranks 0 and 2 differ in `check_signatures`"), "{error}");
        }
    }

    #[test]
    fn what_is_done_is_done_although_the_group_has_failed() {
        let results = launch(&LaunchConfig::new(1), |comm| {
            let control = ControlGroup::new(comm, Duration::ZERO);
            control.comm.abort("out of luck");
            let operation = Operation::new("test");
            assert_eq!(control.poll(operation, || Ok(true), Vec::new), Ok(()));
            control.poll(operation, || Ok(false), Vec::new)
        });
        assert!(results[0].as_ref().unwrap_err().to_string().contains("out of luck"), "{results:?}");
    }

    #[test]
    fn groups_share_their_failure_and_name_the_worlds_ranks() {
        let results = launch(&LaunchConfig::new(4), |comm| {
            let world = ControlGroup::new(comm, Duration::ZERO);
            // Ranks 0 and 2, ranks 1 and 3.
            let group = world.split("test", world.comm.rank() as u64 % 2, 0)?;
            world.comm.barrier(Operation::new("start"))?;
            if world.comm.rank() == 1 {
                return Err(group.fail(group.timed_out(Operation::new("test"), vec![1])));
            }
            while world.failure().is_none() {
                std::thread::yield_now();
            }
            assert_eq!(group.failure(), world.failure());
            group.check(Operation::new("test"))
        });
        for (rank, result) in results.into_iter().enumerate() {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("rank(s) [3] did not take part"), "{error}");
            assert_eq!(error.contains("rank 1 failed"), rank != 1, "{error}");
        }
    }
}
