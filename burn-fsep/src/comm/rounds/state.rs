use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{
    group_ranks::GroupRanks,
    round::{Part, Round, RoundKey},
};
use crate::comm::CommError;

/// How long a collective still waits for parts after another process has failed. All others are told of the failure, so it
/// ends sooner unless one of them hangs.
const GRACE: Duration = Duration::from_secs(3);
/// Most parts of another process that wait for this one. A rank can only be ahead by the exchanges that it has started.
const MAX_AHEAD: usize = 1 << 16;

/// What is known of a rank.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RankState {
    Present,
    /// It left in peace.
    Left,
    /// Its group has failed, or it is lost: nothing more comes.
    Ended,
}

struct Failure {
    error: CommError,
    /// Ended by a rank of this process.
    is_own: bool,
    since: Instant,
}

struct State {
    rounds: HashMap<RoundKey, Round>,
    ranks: Vec<RankState>,
    /// Parts of each rank in the rounds. Shape `[N]`, of the world, as `ranks`.
    ahead: Vec<usize>,
    failure: Option<Failure>,
}

/// The collectives that are under way in all groups of a job, as the ranks of one process see them, and what ended the job. Ranks are
/// those of the world.
pub(in crate::comm) struct Rounds {
    /// Ranks of this process: one or all. Those of a round's group take its parts.
    local: usize,
    timeout: Duration,
    /// Tells other processes of the first failure.
    tell: Box<dyn Fn(&CommError) + Send + Sync>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Rounds {
    pub fn new(
        size: usize,
        local: usize,
        timeout: Duration,
        tell: impl Fn(&CommError) + Send + Sync + 'static,
    ) -> Self {
        let (ranks, ahead) = (vec![RankState::Present; size], vec![0; size]);
        let state = Mutex::new(State { rounds: HashMap::new(), ranks, ahead, failure: None });
        Self { local, timeout, tell: Box::new(tell), state, changed: Condvar::new() }
    }

    pub fn failure(&self) -> Option<CommError> {
        self.state.lock().failure.as_ref().map(|failure| failure.error.clone())
    }

    /// Ends all groups on all ranks because of an error of this process; returns the error.
    pub fn fail(&self, error: CommError) -> CommError {
        self.end(&mut self.state.lock(), error, true)
    }

    /// Records the first failure, tells of it and wakes everyone; returns the error.
    fn end(&self, state: &mut State, error: CommError, is_own: bool) -> CommError {
        if state.failure.is_none() {
            state.failure = Some(Failure { error: error.clone(), is_own, since: Instant::now() });
            (self.tell)(&error);
        }
        self.changed.notify_all();
        error
    }

    /// Adds the part of a rank of this process to a round of `group`, and sends it, if the job lives.
    pub fn add(
        &self,
        key: RoundKey,
        group: &Arc<GroupRanks>,
        rank: usize,
        operation: &str,
        part: Part,
        send: impl FnOnce(),
    ) -> Result<(), CommError> {
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.error.seen_from(operation));
        }
        if state.ranks[rank] == RankState::Left {
            let reason = "this rank has left the group".into();
            return Err(CommError::InvalidArgument { operation: operation.into(), reason });
        }
        send();
        if let Err(stranger) = state.rounds.entry(key).or_insert_with(|| Round::new(rank)).join(group) {
            return Err(self.end(&mut state, unwanted(stranger, operation.into()), true));
        }
        self.insert(&mut state, key, rank, part);
        Ok(())
    }

    /// The part of a rank of another process has come.
    pub fn deliver(&self, key: RoundKey, rank: usize, part: Part) {
        let mut state = self.state.lock();
        let is_unwanted = state.rounds.get(&key).is_some_and(|round| !round.lacks(rank));
        if is_unwanted || state.ahead[rank] == MAX_AHEAD {
            self.end(&mut state, unwanted(rank, part.signature), true);
            return;
        }
        self.insert(&mut state, key, rank, part);
    }

    fn insert(&self, state: &mut State, key: RoundKey, rank: usize, part: Part) {
        let round = state.rounds.entry(key).or_insert_with(|| Round::new(rank));
        round.insert(rank, part);
        state.ahead[rank] += 1;
        if round.complete().is_some() || round.differs.is_some() {
            self.changed.notify_all();
        }
        self.finish(state, key, 0);
    }

    /// `ranks` more are done with a round, which ends with the last.
    fn finish(&self, state: &mut State, key: RoundKey, ranks: usize) {
        let Some(round) = state.rounds.get_mut(&key) else { return };
        round.done += ranks;
        if let Some(group) = round.complete().cloned()
            && round.done == self.local.min(group.len())
        {
            state.rounds.remove(&key);
            group.iter().for_each(|rank| state.ahead[rank] -= 1);
        }
    }

    /// A rank that has added its part does without the others'.
    pub fn cancel(&self, key: RoundKey) {
        self.finish(&mut self.state.lock(), key, 1);
    }

    /// Waits for the parts of all ranks of the round's group, once, after `rank` has added its own. In the group's order, shape `[N]`.
    pub fn wait(&self, key: RoundKey, rank: usize, operation: &str) -> Result<Vec<Arc<Part>>, CommError> {
        // None: a timeout that no clock can express is none.
        let deadline = Instant::now().checked_add(self.timeout);
        let mut state = self.state.lock();
        loop {
            let Some(round) = state.rounds.get(&key) else {
                unreachable!("a round lives until all ranks of this process are done with it")
            };
            if let Some(error) = round.mismatch(key.1, rank) {
                return Err(self.end(&mut state, error, true));
            }
            // First of all: a collective that all ranks have reached completes, so that all see what one of them saw.
            if let Some(parts) = round.all_parts() {
                self.finish(&mut state, key, 1);
                return Ok(parts);
            }
            self.check_missing(&mut state, key, rank, operation, deadline)?;
            let grace = state.failure.as_ref().map(|failure| failure.since + GRACE);
            match deadline.into_iter().chain(grace).min() {
                Some(limit) => drop(self.changed.wait_until(&mut state, limit)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// Whether it makes sense to wait for the ranks whose parts have not come.
    fn check_missing(
        &self,
        state: &mut State,
        key: RoundKey,
        rank: usize,
        operation: &str,
        deadline: Option<Instant>,
    ) -> Result<(), CommError> {
        let State { rounds, ranks, failure, .. } = &*state;
        let missing = rounds.get(&key).map(Round::missing).unwrap_or_default();
        if let Some(failure) = failure {
            let is_hopeless = missing.iter().any(|&rank| ranks[rank] != RankState::Present);
            if failure.is_own || is_hopeless || failure.since.elapsed() >= GRACE {
                return Err(failure.error.seen_from(operation));
            }
            return Ok(());
        }
        if let Some(gone) = missing.iter().copied().find(|&rank| ranks[rank] == RankState::Left) {
            let reason = "it left the group (its program or thread ended, or it dropped its communicator)".into();
            let error = CommError::PeerFailed { rank: gone, operation: operation.into(), reason, lost: true };
            return Err(self.end(state, error, true));
        }
        // Whoever came just before the deadline was seen.
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let meanwhile = state.meanwhile(rank, &missing);
            let error = CommError::Timeout { operation: operation.into(), waited: self.timeout, missing, meanwhile };
            return Err(self.end(state, error, true));
        }
        Ok(())
    }

    /// A rank leaves in peace: whoever still waits for it waits in vain.
    pub fn leave(&self, rank: usize) {
        let state = &mut self.state.lock().ranks[rank];
        if *state == RankState::Present {
            *state = RankState::Left;
        }
        self.changed.notify_all();
    }

    /// Whether a rank has left in peace, rather than because the group has failed.
    pub fn has_left(&self, rank: usize) -> bool {
        self.state.lock().ranks[rank] == RankState::Left
    }

    /// The group of a rank of another process has failed, as `own`, of this process, learns.
    pub fn rank_failed(&self, own: usize, rank: usize, error: CommError) {
        let mut state = self.state.lock();
        state.ranks[rank] = RankState::Ended;
        // A rank that has left does not pass it on. So to the one that failed it has either left, or ended with the failure,
        // and that one knows whether it was heard.
        if state.failure.is_some() || state.ranks[own] != RankState::Left {
            self.end(&mut state, error, false);
        }
    }

    /// The connection to a rank of another process has ended. One that has left, or told why it ends, ends it.
    pub fn rank_lost(&self, rank: usize, reason: String) {
        let mut state = self.state.lock();
        if state.ranks[rank] == RankState::Present {
            state.ranks[rank] = RankState::Ended;
            let operation = "waiting for its peers".into();
            self.end(&mut state, CommError::PeerFailed { rank, operation, reason, lost: true }, false);
        }
    }
}

impl State {
    /// Where one of the missing ranks has come, and `rank` has not: where programs differ, on other communicators that both are in.
    fn meanwhile(&self, rank: usize, missing: &[usize]) -> Option<String> {
        let without_us = self.rounds.iter().filter(|(_, round)| round.lacks(rank));
        let theirs = without_us.filter_map(|((_, sequence), round)| {
            let (peer, part) = missing.iter().find_map(|&peer| Some((peer, round.part(peer)?)))?;
            Some((sequence, peer, &part.signature))
        });
        let (_, peer, signature) = theirs.min_by_key(|(sequence, ..)| *sequence)?;
        Some(format!("rank {peer} has come to {signature}, and rank {rank} has not"))
    }
}

fn unwanted(rank: usize, operation: String) -> CommError {
    CommError::Engine { operation, reason: format!("rank {rank} sends what nobody waits for") }
}
