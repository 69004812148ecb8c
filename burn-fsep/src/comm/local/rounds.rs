use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use burn::tensor::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::comm::{Block, CommError};

/// A rank's part of a collective: its description, compared across ranks, and its data, read by its peers.
pub(super) struct Part {
    pub signature: String,
    pub send: Arc<Bytes>,
    /// What of `send` is for each rank. Shape `[N]`.
    pub blocks: Vec<Vec<Block>>,
}

/// Names a collective: communicator and number on it.
pub(super) type RoundKey = (usize, u64);

/// A collective that some rank has reached.
struct Round {
    parts: Vec<Option<Arc<Part>>>,
    missing: usize,
    /// Ranks that have the parts, or do without.
    done: usize,
}

#[derive(Default)]
struct State {
    rounds: HashMap<RoundKey, Round>,
    failure: Option<CommError>,
    has_left: Vec<bool>,
}

/// The collectives of a group that are under way: a rank brings its part and waits for the others'.
pub(super) struct Rounds {
    size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

impl Rounds {
    pub fn new(size: usize, timeout: Duration) -> Self {
        let state = State { has_left: vec![false; size], ..State::default() };
        Self { size, timeout, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub fn size(&self) -> usize {
        self.size
    }

    pub fn failure(&self) -> Option<CommError> {
        self.state.lock().failure.clone()
    }

    /// Records the first failure and wakes everyone. Returns this rank's own error, which says how it looks from here.
    pub fn fail(&self, error: CommError) -> CommError {
        self.fail_locked(&mut self.state.lock(), error)
    }

    fn fail_locked(&self, state: &mut State, error: CommError) -> CommError {
        state.failure.get_or_insert_with(|| error.clone());
        self.changed.notify_all();
        error
    }

    /// A rank leaves: whoever still waits for it waits in vain.
    pub fn leave(&self, rank: usize) {
        self.state.lock().has_left[rank] = true;
        self.changed.notify_all();
    }

    pub fn add(&self, key: RoundKey, rank: usize, operation: &str, part: Part) -> Result<(), CommError> {
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.seen_from(operation));
        }
        let empty = || Round { parts: vec![None; self.size], missing: self.size, done: 0 };
        let round = state.rounds.entry(key).or_insert_with(empty);
        round.parts[rank] = Some(Arc::new(part));
        round.missing -= 1;
        if round.missing == 0 {
            self.changed.notify_all();
        }
        Ok(())
    }

    /// A rank that has added its part does without the others'.
    pub fn cancel(&self, key: RoundKey) {
        self.finish(&mut self.state.lock(), key);
    }

    /// One rank more is done with a round.
    fn finish(&self, state: &mut State, key: RoundKey) {
        let Some(round) = state.rounds.get_mut(&key) else { return };
        round.done += 1;
        if round.done == self.size {
            state.rounds.remove(&key);
        }
    }

    /// Waits for the parts of all ranks. Shape `[N]`.
    pub fn wait(&self, key: RoundKey, rank: usize, operation: &str) -> Result<Vec<Arc<Part>>, CommError> {
        // None: a timeout that no clock can express is none.
        let deadline = Instant::now().checked_add(self.timeout);
        let mut state = self.state.lock();
        loop {
            let Some(round) = state.rounds.get(&key) else {
                unreachable!("a rank waits only after it added its part, and a round lives until all are done")
            };
            if round.missing == 0 {
                let parts: Vec<_> = round.parts.iter().flatten().cloned().collect();
                self.finish(&mut state, key);
                drop(state);
                self.check_signatures(key, rank, &parts)?;
                return Ok(parts);
            }
            // Only now: a collective that all ranks have reached completes, so that all see what one of them saw.
            if let Some(failure) = &state.failure {
                return Err(failure.seen_from(operation));
            }
            let missing = || (0..self.size).filter(|&rank| round.parts[rank].is_none());
            if let Some(gone) = missing().find(|&rank| state.has_left[rank]) {
                let reason = "it left the group (its thread ended or it dropped its communicator)".into();
                let error = CommError::PeerFailed { rank: gone, operation: operation.into(), reason, lost: true };
                return Err(self.fail_locked(&mut state, error));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let missing = missing().collect();
                let error = CommError::Timeout { operation: operation.into(), waited: self.timeout, missing };
                return Err(self.fail_locked(&mut state, error));
            }
            // Whoever came just before the deadline is seen by the next round of the loop.
            match deadline {
                Some(deadline) => drop(self.changed.wait_until(&mut state, deadline)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    fn check_signatures(&self, key: RoundKey, rank: usize, parts: &[Arc<Part>]) -> Result<(), CommError> {
        let ours = &parts[rank].signature;
        match parts.iter().position(|part| part.signature != *ours) {
            None => Ok(()),
            Some(peer) => {
                let signatures = [ours.clone(), parts[peer].signature.clone()];
                Err(self.fail(CommError::mismatch(key.1, rank, peer, signatures)))
            }
        }
    }
}
