use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use burn::tensor::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::comm::{Block, CommError};

/// How long a collective still waits for parts after another process has failed. All others are told of the failure, so it
/// ends sooner unless one of them hangs.
const GRACE: Duration = Duration::from_secs(3);
/// Most parts of another process that wait for this one. A rank can only be ahead by the exchanges that it has started.
const MAX_AHEAD: usize = 1 << 16;

/// Names a collective: communicator and number on it.
pub(in crate::comm) type RoundKey = (u64, u64);

/// A rank's part of a collective.
#[derive(Debug, Clone)]
pub(in crate::comm) struct Part {
    /// What the rank is doing, compared across ranks.
    pub signature: String,
    pub data: Arc<Bytes>,
    /// What of the data is for each rank, or, of a part that was sent to one rank, for that one.
    pub blocks: Vec<Vec<Block>>,
}

impl Part {
    /// The blocks for a rank.
    pub fn blocks_for(&self, rank: usize) -> impl Iterator<Item = &[u8]> {
        let blocks = if let [only] = self.blocks.as_slice() { only } else { &self.blocks[rank] };
        blocks.iter().map(|block| &self.data[block.range()])
    }
}

/// A collective that some rank has reached.
struct Round {
    /// Shape `[N]`.
    parts: Vec<Option<Arc<Part>>>,
    missing: usize,
    /// The rank whose part came first.
    first: usize,
    /// A rank that does something else than the first one.
    differs: Option<usize>,
    /// Ranks of this process that have the parts, or do without.
    done: usize,
}

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
    /// Parts of each rank in the rounds.
    ahead: Vec<usize>,
    failure: Option<Failure>,
}

/// The collectives of a group that are under way, as the ranks of one process see them.
pub(in crate::comm) struct Rounds {
    pub size: usize,
    /// Ranks of this process, each of which takes the parts of a round.
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
        Self { size, local, timeout, tell: Box::new(tell), state, changed: Condvar::new() }
    }

    pub fn failure(&self) -> Option<CommError> {
        self.state.lock().failure.as_ref().map(|failure| failure.error.clone())
    }

    /// Ends the group on all ranks because of an error of this process; returns the error.
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

    /// Adds the part of a rank of this process, and sends it, if the group lives.
    pub fn add(
        &self,
        key: RoundKey,
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
        self.insert(&mut state, key, rank, part);
        Ok(())
    }

    /// The part of a rank of another process has come.
    pub fn deliver(&self, key: RoundKey, rank: usize, part: Part) {
        let mut state = self.state.lock();
        let is_known = state.rounds.get(&key).is_some_and(|round| round.parts[rank].is_some());
        if is_known || state.ahead[rank] == MAX_AHEAD {
            let reason = format!("rank {rank} sends what nobody waits for");
            self.end(&mut state, CommError::Engine { operation: part.signature, reason }, true);
            return;
        }
        self.insert(&mut state, key, rank, part);
    }

    fn insert(&self, state: &mut State, key: RoundKey, rank: usize, part: Part) {
        let round = state.rounds.entry(key).or_insert_with(|| Round {
            parts: vec![None; self.size],
            missing: self.size,
            first: rank,
            differs: None,
            done: 0,
        });
        if round.parts[round.first].as_ref().is_some_and(|first| first.signature != part.signature) {
            round.differs.get_or_insert(rank);
        }
        round.parts[rank] = Some(Arc::new(part));
        round.missing -= 1;
        state.ahead[rank] += 1;
        if round.missing == 0 || round.differs.is_some() {
            self.changed.notify_all();
        }
        self.finish(state, key, 0);
    }

    /// `ranks` more are done with a round, which ends with the last.
    fn finish(&self, state: &mut State, key: RoundKey, ranks: usize) {
        let Some(round) = state.rounds.get_mut(&key) else { return };
        round.done += ranks;
        if round.done == self.local && round.missing == 0 {
            state.rounds.remove(&key);
            state.ahead.iter_mut().for_each(|ahead| *ahead -= 1);
        }
    }

    /// A rank that has added its part does without the others'.
    pub fn cancel(&self, key: RoundKey) {
        self.finish(&mut self.state.lock(), key, 1);
    }

    /// Waits for the parts of all ranks, once, after `rank` has added its own. Shape `[N]`.
    pub fn wait(&self, key: RoundKey, rank: usize, operation: &str) -> Result<Vec<Arc<Part>>, CommError> {
        // None: a timeout that no clock can express is none.
        let deadline = Instant::now().checked_add(self.timeout);
        let mut state = self.state.lock();
        loop {
            let Some(round) = state.rounds.get(&key) else {
                unreachable!("a round lives until all ranks of this process are done with it")
            };
            if let Some(error) = round.mismatch(key, rank) {
                return Err(self.end(&mut state, error, true));
            }
            // First of all: a collective that all ranks have reached completes, so that all see what one of them saw.
            if round.missing == 0 {
                let parts = round.parts.iter().flatten().cloned().collect();
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
        let mut missing = (0..self.size).filter(|&rank| rounds.get(&key).is_some_and(|r| r.parts[rank].is_none()));
        if let Some(failure) = failure {
            let is_hopeless = missing.any(|rank| ranks[rank] != RankState::Present);
            if failure.is_own || is_hopeless || failure.since.elapsed() >= GRACE {
                return Err(failure.error.seen_from(operation));
            }
            return Ok(());
        }
        if let Some(gone) = missing.clone().find(|&rank| ranks[rank] == RankState::Left) {
            let reason = "it left the group (its program or thread ended, or it dropped its communicator)".into();
            let error = CommError::PeerFailed { rank: gone, operation: operation.into(), reason, lost: true };
            return Err(self.end(state, error, true));
        }
        // Whoever came just before the deadline was seen.
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let missing: Vec<usize> = missing.collect();
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
    /// Where one of the missing ranks has come, and `rank` has not: where programs differ, on other communicators of the group.
    fn meanwhile(&self, rank: usize, missing: &[usize]) -> Option<String> {
        let without_us = self.rounds.iter().filter(|(_, round)| round.parts[rank].is_none());
        let theirs = without_us.filter_map(|((_, sequence), round)| {
            let peer = *missing.iter().find(|&&peer| round.parts[peer].is_some())?;
            Some((sequence, peer, &round.parts[peer].as_ref()?.signature))
        });
        let (_, peer, signature) = theirs.min_by_key(|(sequence, ..)| *sequence)?;
        Some(format!("rank {peer} has come to {signature}, and rank {rank} has not"))
    }
}

impl Round {
    /// How a rank that has added its part finds that another one does something else.
    fn mismatch(&self, key: RoundKey, rank: usize) -> Option<CommError> {
        let signature = |rank: usize| Some(self.parts[rank].as_ref()?.signature.clone());
        let (ours, differs) = (signature(rank)?, self.differs?);
        let peer =
            [self.first, differs].into_iter().find(|&peer| signature(peer).is_some_and(|theirs| theirs != ours))?;
        Some(CommError::mismatch(key.1, rank, peer, [ours, signature(peer)?]))
    }
}
