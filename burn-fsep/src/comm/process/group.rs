use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{
    RendezvousError,
    error::system,
    frame::{Frame, Outgoing, RoundKey},
    link::{self, Links},
};
use crate::comm::CommError;

/// How long a collective still waits for frames after another rank has failed. All others are told of the failure, so it ends
/// sooner unless one of them hangs.
const GRACE: Duration = Duration::from_secs(3);
/// How long a rank that leaves waits until its peers have received everything.
const FAREWELL: Duration = Duration::from_secs(30);
/// As above, if the group has failed.
const FAREWELL_AFTER_FAILURE: Duration = Duration::from_secs(2);
/// Most frames of one peer that wait for this rank. A rank can only be ahead by the exchanges that it has started.
const MAX_UNCLAIMED: usize = 1 << 16;

/// What is known of a peer.
enum Standing {
    Present,
    /// It left in peace.
    Left,
    /// Its group has failed, or it is lost: no more frames come.
    Ended,
}

struct Peer {
    /// `None` for this rank itself, and after it has left.
    queue: Option<mpsc::Sender<Outgoing>>,
    standing: Standing,
    unclaimed: usize,
}

/// A collective that some rank has reached.
#[derive(Default)]
struct Round {
    /// This rank's own description of it.
    ours: Option<String>,
    /// What the peers sent, by rank.
    frames: Vec<Option<Frame>>,
    /// Nobody waits for it any more.
    is_abandoned: bool,
}

struct Failure {
    error: CommError,
    /// Ended by this rank itself.
    is_own: bool,
    since: Instant,
}

struct State {
    rounds: HashMap<RoundKey, Round>,
    peers: Vec<Peer>,
    failure: Option<Failure>,
    has_left: bool,
    /// Threads that still write.
    writers: usize,
    /// Threads that still read.
    readers: usize,
}

/// One rank's side of the group: what the peers sent, how they are, and what is to be sent to them.
pub(super) struct Group {
    pub rank: usize,
    pub size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

impl Group {
    /// Starts two threads for each connection.
    pub fn start(rank: usize, links: Links, timeout: Duration) -> Result<Arc<Self>, RendezvousError> {
        let mut peers = Vec::new();
        let mut queues = Vec::new();
        for stream in links {
            let (sender, receiver) = mpsc::channel();
            let queue = stream.is_some().then_some(sender);
            peers.push(Peer { queue, standing: Standing::Present, unclaimed: 0 });
            queues.push(stream.map(|stream| (stream, receiver)));
        }
        let links = queues.iter().flatten().count();
        let state =
            State { rounds: HashMap::new(), peers, failure: None, has_left: false, writers: links, readers: links };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let group = Arc::new(Self { rank, size: queues.len(), timeout, state, changed });
        for (peer, queue) in queues.into_iter().enumerate() {
            let Some((stream, receiver)) = queue else { continue };
            if let Err(error) = link::start(&group, peer, stream, receiver) {
                let reason = format!("no threads for its connections: {error}");
                group.fail(CommError::PeerFailed { rank, operation: "start".into(), reason, lost: false });
                group.leave();
                return Err(system("threads for the connections")(error));
            }
        }
        Ok(group)
    }

    pub fn failure(&self) -> Option<CommError> {
        self.state.lock().failure.as_ref().map(|failure| failure.error.clone())
    }

    /// Ends the group on all ranks because of an error of this one; returns the error.
    pub fn fail(&self, error: CommError) -> CommError {
        self.end(&mut self.state.lock(), error, true)
    }

    /// Records the first failure, tells the peers and wakes everyone; returns the error.
    fn end(&self, state: &mut State, error: CommError, is_own: bool) -> CommError {
        if state.failure.is_none() {
            state.failure = Some(Failure { error: error.clone(), is_own, since: Instant::now() });
            for queue in state.peers.iter().filter_map(|peer| peer.queue.as_ref()) {
                // Without its writer, the peer is gone.
                let _ = queue.send(Outgoing::end(&error));
            }
        }
        self.changed.notify_all();
        error
    }

    /// Sends this rank's parts of a collective to the peers, if the group lives; `part` makes the part of a peer.
    pub fn deposit(
        &self,
        key: RoundKey,
        operation: &str,
        signature: String,
        part: impl Fn(usize) -> Outgoing,
    ) -> Result<(), CommError> {
        let parts: Vec<_> = (0..self.size).map(|peer| (peer != self.rank).then(|| part(peer))).collect();
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.error.seen_from(operation));
        }
        if state.has_left {
            let reason = "this rank has left the group".into();
            return Err(CommError::InvalidArgument { operation: operation.into(), reason });
        }
        for (peer, part) in state.peers.iter().zip(parts) {
            if let (Some(queue), Some(part)) = (&peer.queue, part) {
                // Without its writer, the peer is gone, which shows.
                let _ = queue.send(part);
            }
        }
        self.round(&mut state, key).ours = Some(signature);
        Ok(())
    }

    /// Waits for all peers' parts. Shape `[N]`; `None` for this rank.
    pub fn collect(&self, key: RoundKey, operation: &str) -> Result<Vec<Option<Frame>>, CommError> {
        // None: a timeout that no clock can express is none.
        let deadline = Instant::now().checked_add(self.timeout);
        let mut state = self.state.lock();
        loop {
            let round = self.round(&mut state, key);
            if let Some(error) = mismatch(round, key, self.rank) {
                return Err(self.end(&mut state, error, true));
            }
            let missing: Vec<usize> =
                (0..self.size).filter(|&peer| peer != self.rank && round.frames[peer].is_none()).collect();
            // First of all: a collective that all ranks have reached completes, so that all see what one of them saw.
            if missing.is_empty() {
                return Ok(take(&mut state, key));
            }
            self.check_missing(&mut state, &missing, operation, deadline)?;
            let grace = state.failure.as_ref().map(|failure| failure.since + GRACE);
            match deadline.into_iter().chain(grace).min() {
                Some(limit) => drop(self.changed.wait_until(&mut state, limit)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// Whether it makes sense to wait for the `missing` ranks.
    fn check_missing(
        &self,
        state: &mut State,
        missing: &[usize],
        operation: &str,
        deadline: Option<Instant>,
    ) -> Result<(), CommError> {
        let standing = |peer: usize| &state.peers[peer].standing;
        if let Some(failure) = &state.failure {
            let is_hopeless = missing.iter().any(|&peer| !matches!(standing(peer), Standing::Present));
            if failure.is_own || is_hopeless || failure.since.elapsed() >= GRACE {
                return Err(failure.error.seen_from(operation));
            }
        }
        if let Some(&gone) = missing.iter().find(|&&peer| matches!(standing(peer), Standing::Left)) {
            let reason = "it left the group (its program ended or it dropped its communicator)".into();
            let error = CommError::PeerFailed { rank: gone, operation: operation.into(), reason, lost: true };
            return Err(self.end(state, error, true));
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let missing = missing.to_vec();
            let error = CommError::Timeout { operation: operation.into(), waited: self.timeout, missing };
            return Err(self.end(state, error, true));
        }
        Ok(())
    }

    /// Nobody will collect this round.
    pub fn abandon(&self, key: RoundKey) {
        let mut state = self.state.lock();
        let round = self.round(&mut state, key);
        round.is_abandoned = true;
        if round.frames.iter().flatten().count() + 1 == self.size {
            take(&mut state, key);
        }
    }

    /// A peer's part has come.
    pub fn deliver(&self, key: RoundKey, peer: usize, frame: Frame) {
        let mut state = self.state.lock();
        if state.has_left {
            return;
        }
        let unclaimed = state.peers[peer].unclaimed + 1;
        let round = self.round(&mut state, key);
        if round.frames[peer].is_some() || unclaimed > MAX_UNCLAIMED {
            let reason = format!("rank {peer} sends what nobody waits for");
            self.end(&mut state, CommError::Engine { operation: frame.signature, reason }, true);
            return;
        }
        round.frames[peer] = Some(frame);
        let is_over = round.is_abandoned && round.frames.iter().flatten().count() + 1 == self.size;
        state.peers[peer].unclaimed = unclaimed;
        if is_over {
            take(&mut state, key);
        }
        self.changed.notify_all();
    }

    /// A peer's group has failed.
    pub fn peer_ended(&self, peer: usize, error: CommError) {
        let mut state = self.state.lock();
        state.peers[peer].standing = Standing::Ended;
        self.end(&mut state, error, false);
    }

    /// A peer left in peace: whoever still waits for it waits in vain.
    pub fn peer_left(&self, peer: usize) {
        let standing = &mut self.state.lock().peers[peer].standing;
        if matches!(standing, Standing::Present) {
            *standing = Standing::Left;
        }
        self.changed.notify_all();
    }

    /// The connection to a peer has ended.
    pub fn peer_lost(&self, peer: usize, reason: String) {
        let mut state = self.state.lock();
        // A rank that has left does not mind; one that was told the reason knows better.
        if matches!(state.peers[peer].standing, Standing::Present) {
            state.peers[peer].standing = Standing::Ended;
            if !state.has_left {
                let operation = "waiting for its peers".into();
                self.end(&mut state, CommError::PeerFailed { rank: peer, operation, reason, lost: true }, false);
            }
        }
    }

    /// Leaves the group and waits, for a limited time, until what was sent to the peers is on its way. Nothing if it has left.
    pub fn leave(&self) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.has_left, true) {
            return;
        }
        for peer in &mut state.peers {
            if let Some(queue) = peer.queue.take() {
                let _ = queue.send(Outgoing::goodbye());
            }
        }
        let limit = if state.failure.is_some() { FAREWELL_AFTER_FAILURE } else { FAREWELL.min(self.timeout) };
        let deadline = Instant::now() + limit;
        // What a peer sends to a process that has ended makes its system throw away what this rank has sent last: why it failed.
        // So this rank also reads until its peers, which learn of the failure, send nothing more.
        let is_busy = |state: &State| state.writers > 0 || state.failure.is_some() && state.readers > 0;
        while is_busy(&state) && !self.changed.wait_until(&mut state, deadline).timed_out() {}
    }

    pub fn writer_ended(&self) {
        self.state.lock().writers -= 1;
        self.changed.notify_all();
    }

    pub fn reader_ended(&self) {
        self.state.lock().readers -= 1;
        self.changed.notify_all();
    }

    fn round<'a>(&self, state: &'a mut MutexGuard<'_, State>, key: RoundKey) -> &'a mut Round {
        let round = state.rounds.entry(key).or_default();
        round.frames.resize_with(self.size, || None);
        round
    }
}

/// A peer that does something else than this rank.
fn mismatch(round: &Round, key: RoundKey, rank: usize) -> Option<CommError> {
    let ours = round.ours.as_ref()?;
    let differs = |frame: &Option<Frame>| frame.as_ref().is_some_and(|frame| frame.signature != *ours);
    let peer = round.frames.iter().position(differs)?;
    Some(CommError::Mismatch {
        sequence: key.1,
        rank,
        operation: ours.clone(),
        peer,
        peer_operation: round.frames[peer].as_ref()?.signature.clone(),
    })
}

/// Removes a round; returns its frames.
fn take(state: &mut State, key: RoundKey) -> Vec<Option<Frame>> {
    let frames = state.rounds.remove(&key).map(|round| round.frames).unwrap_or_default();
    for (peer, frame) in frames.iter().enumerate() {
        state.peers[peer].unclaimed -= usize::from(frame.is_some());
    }
    frames
}
