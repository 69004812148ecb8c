use std::{
    any::Any,
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use crate::comm::CommError;

/// What a rank brings to a collective: its description, compared across ranks, and its data, read by its peers.
pub(super) struct Deposit {
    pub signature: String,
    pub payload: Box<dyn Any + Send + Sync>,
}

/// Names a collective: communicator and number on it.
pub(super) type RoundKey = (usize, u64);

#[derive(Default)]
struct Round {
    deposits: Vec<Option<Arc<Deposit>>>,
    taken: usize,
}

#[derive(Default)]
struct State {
    rounds: HashMap<RoundKey, Round>,
    failure: Option<CommError>,
    departed: Vec<bool>,
}

/// The meeting place of the ranks: a rank deposits what it brings to a collective and waits for the others' deposits.
pub(super) struct Group {
    size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

impl Group {
    pub fn new(size: usize, timeout: Duration) -> Self {
        let state = State { departed: vec![false; size], ..State::default() };
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
        self.state.lock().failure.get_or_insert_with(|| error.clone());
        self.changed.notify_all();
        error
    }

    /// A rank dropped its last handle: whoever still waits for it waits in vain.
    pub fn depart(&self, rank: usize) {
        self.state.lock().departed[rank] = true;
        self.changed.notify_all();
    }

    pub fn deposit(&self, key: RoundKey, rank: usize, operation: &str, deposit: Deposit) -> Result<(), CommError> {
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.seen_from(operation));
        }
        let size = self.size;
        let round = state.rounds.entry(key).or_default();
        round.deposits.resize(size, None);
        round.deposits[rank] = Some(Arc::new(deposit));
        self.changed.notify_all();
        Ok(())
    }

    /// A rank that has deposited does without the others' deposits.
    pub fn forgo(&self, key: RoundKey) {
        let mut state = self.state.lock();
        if let Some(round) = state.rounds.get_mut(&key) {
            round.taken += 1;
            if round.taken == self.size {
                state.rounds.remove(&key);
            }
        }
    }

    /// Waits for the deposits of all ranks. Shape `[N]`.
    pub fn collect(&self, key: RoundKey, rank: usize, operation: &str) -> Result<Vec<Arc<Deposit>>, CommError> {
        // None: a timeout that no clock can express is none.
        let deadline = Instant::now().checked_add(self.timeout);
        let mut state = self.state.lock();
        loop {
            let Some(round) = state.rounds.get_mut(&key) else {
                unreachable!("a rank collects only after it deposited, and a round lives until all have collected")
            };
            let missing: Vec<usize> = (0..self.size).filter(|&r| round.deposits[r].is_none()).collect();
            if missing.is_empty() {
                let deposits: Vec<_> = round.deposits.iter().flatten().cloned().collect();
                round.taken += 1;
                if round.taken == self.size {
                    state.rounds.remove(&key);
                }
                drop(state);
                self.check_signatures(key, rank, &deposits)?;
                return Ok(deposits);
            }
            // Only now: a collective that all ranks have reached completes, so that all see what one of them saw.
            if let Some(failure) = &state.failure {
                return Err(failure.seen_from(operation));
            }
            if let Some(&gone) = missing.iter().find(|&&r| state.departed[r]) {
                let error = CommError::PeerFailed {
                    rank: gone,
                    operation: operation.to_string(),
                    reason: "it left the group (its thread ended or it dropped its communicator)".into(),
                    lost: true,
                };
                state.failure.get_or_insert(error.clone());
                self.changed.notify_all();
                return Err(error);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let error = CommError::Timeout { operation: operation.to_string(), waited: self.timeout, missing };
                state.failure.get_or_insert(error.clone());
                self.changed.notify_all();
                return Err(error);
            }
            // Whoever came just before the deadline is seen by the next round of the loop.
            match deadline {
                Some(deadline) => drop(self.changed.wait_until(&mut state, deadline)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    fn check_signatures(&self, key: RoundKey, rank: usize, deposits: &[Arc<Deposit>]) -> Result<(), CommError> {
        let ours = &deposits[rank].signature;
        match deposits.iter().position(|deposit| deposit.signature != *ours) {
            None => Ok(()),
            Some(peer) => Err(self.fail(CommError::Mismatch {
                sequence: key.1,
                rank,
                operation: ours.clone(),
                peer,
                peer_operation: deposits[peer].signature.clone(),
            })),
        }
    }
}
