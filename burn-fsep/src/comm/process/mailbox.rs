use std::{
    collections::HashMap,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{
    RendezvousError,
    connection::{self, Connections},
    error::system,
    message::{Frame, Outgoing, RoundKey},
};
use crate::comm::CommError;

/// How long a collective still waits for frames after another rank has failed. All others are told of the failure, so it ends
/// sooner unless one of them hangs.
const GRACE: Duration = Duration::from_secs(3);
/// How long a rank that leaves waits until its peers have received everything.
const LEAVE: Duration = Duration::from_secs(30);
/// As above, if the group has failed.
const LEAVE_AFTER_FAILURE: Duration = Duration::from_secs(2);
/// Most frames of one peer that wait for this rank. A rank can only be ahead by the exchanges that it has started.
const MAX_WAITING: usize = 1 << 16;

/// What is known of a peer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PeerState {
    Present,
    /// It left in peace.
    Left,
    /// Its group has failed, or it is lost: no more frames come.
    Ended,
}

struct Peer {
    /// `None` for this rank itself, and after it has left.
    queue: Option<mpsc::Sender<Outgoing>>,
    state: PeerState,
    /// Its frames that this rank has not waited for.
    waiting: usize,
}

/// A collective that some rank has reached.
struct Round {
    /// This rank's own description of it.
    ours: Option<String>,
    /// What the peers sent, by rank.
    frames: Vec<Option<Frame>>,
    /// Peers whose frame has not come.
    missing: usize,
    /// A peer that does something else than this rank.
    differs: Option<usize>,
    /// Nobody waits for it any more.
    is_cancelled: bool,
}

impl Round {
    fn compare(&mut self, peer: usize) {
        if let (Some(ours), Some(frame)) = (&self.ours, &self.frames[peer])
            && frame.signature != *ours
        {
            self.differs.get_or_insert(peer);
        }
    }
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
pub(super) struct Mailbox {
    pub rank: usize,
    pub size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

impl Mailbox {
    /// Starts two threads for each connection.
    pub fn start(rank: usize, connections: Connections, timeout: Duration) -> Result<Arc<Self>, RendezvousError> {
        let mut peers = Vec::new();
        let mut queues = Vec::new();
        for stream in connections {
            let (sender, receiver) = mpsc::channel();
            let queue = stream.is_some().then_some(sender);
            peers.push(Peer { queue, state: PeerState::Present, waiting: 0 });
            queues.push(stream.map(|stream| (stream, receiver)));
        }
        let threads = queues.iter().flatten().count();
        let state =
            State { rounds: HashMap::new(), peers, failure: None, has_left: false, writers: threads, readers: threads };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let mailbox = Arc::new(Self { rank, size: queues.len(), timeout, state, changed });
        for (peer, queue) in queues.into_iter().enumerate() {
            let Some((stream, receiver)) = queue else { continue };
            if let Err(error) = connection::start(&mailbox, peer, stream, receiver) {
                let reason = format!("no threads for its connections: {error}");
                mailbox.fail(CommError::PeerFailed { rank, operation: "start".into(), reason, lost: false });
                mailbox.leave();
                return Err(system("threads for the connections")(error));
            }
        }
        Ok(mailbox)
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

    /// Sends this rank's `frames` of a collective to the peers, if the group lives. Shape `[N]`; its own is not sent.
    pub fn send(
        &self,
        key: RoundKey,
        operation: &str,
        signature: String,
        frames: Vec<Outgoing>,
    ) -> Result<(), CommError> {
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.error.seen_from(operation));
        }
        if state.has_left {
            let reason = "this rank has left the group".into();
            return Err(CommError::InvalidArgument { operation: operation.into(), reason });
        }
        for (peer, frame) in state.peers.iter().zip(frames) {
            if let Some(queue) = &peer.queue {
                // Without its writer, the peer is gone, which shows.
                let _ = queue.send(frame);
            }
        }
        let round = self.round(&mut state, key);
        round.ours = Some(signature);
        (0..self.size).for_each(|peer| round.compare(peer));
        Ok(())
    }

    /// Waits for all peers' frames. Shape `[N]`; `None` for this rank.
    pub fn wait(&self, key: RoundKey, operation: &str) -> Result<Vec<Option<Frame>>, CommError> {
        // None: a timeout that no clock can express is none.
        let deadline = Instant::now().checked_add(self.timeout);
        let mut state = self.state.lock();
        loop {
            let round = self.round(&mut state, key);
            if let (Some(peer), Some(ours)) = (round.differs, &round.ours) {
                let theirs = round.frames[peer].as_ref().map(|frame| frame.signature.clone()).unwrap_or_default();
                let error = CommError::mismatch(key.1, self.rank, peer, [ours.clone(), theirs]);
                return Err(self.end(&mut state, error, true));
            }
            // First of all: a collective that all ranks have reached completes, so that all see what one of them saw.
            if round.missing == 0 {
                return Ok(take(&mut state, key));
            }
            self.check_missing(&mut state, key, operation, deadline)?;
            let grace = state.failure.as_ref().map(|failure| failure.since + GRACE);
            match deadline.into_iter().chain(grace).min() {
                Some(limit) => drop(self.changed.wait_until(&mut state, limit)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// Whether it makes sense to wait for the peers whose frames have not come.
    fn check_missing(
        &self,
        state: &mut State,
        key: RoundKey,
        operation: &str,
        deadline: Option<Instant>,
    ) -> Result<(), CommError> {
        let frames = state.rounds.get(&key).map(|round| round.frames.as_slice()).unwrap_or_default();
        let mut missing = (0..frames.len()).filter(|&peer| peer != self.rank && frames[peer].is_none());
        if let Some(failure) = &state.failure {
            let is_hopeless = missing.any(|peer| state.peers[peer].state != PeerState::Present);
            if failure.is_own || is_hopeless || failure.since.elapsed() >= GRACE {
                return Err(failure.error.seen_from(operation));
            }
            return Ok(());
        }
        if let Some(gone) = missing.clone().find(|&peer| state.peers[peer].state == PeerState::Left) {
            let reason = "it left the group (its program ended or it dropped its communicator)".into();
            let error = CommError::PeerFailed { rank: gone, operation: operation.into(), reason, lost: true };
            return Err(self.end(state, error, true));
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let missing = missing.collect();
            let error = CommError::Timeout { operation: operation.into(), waited: self.timeout, missing };
            return Err(self.end(state, error, true));
        }
        Ok(())
    }

    /// Nobody will wait for this round.
    pub fn cancel(&self, key: RoundKey) {
        let mut state = self.state.lock();
        let round = self.round(&mut state, key);
        round.is_cancelled = true;
        if round.missing == 0 {
            take(&mut state, key);
        }
    }

    /// A peer's frame has come.
    pub fn deliver(&self, key: RoundKey, peer: usize, frame: Frame) {
        let mut state = self.state.lock();
        if state.has_left {
            return;
        }
        let waiting = state.peers[peer].waiting + 1;
        let round = self.round(&mut state, key);
        if round.frames[peer].is_some() || waiting > MAX_WAITING {
            let reason = format!("rank {peer} sends what nobody waits for");
            self.end(&mut state, CommError::Engine { operation: frame.signature, reason }, true);
            return;
        }
        round.frames[peer] = Some(frame);
        round.missing -= 1;
        round.compare(peer);
        let (is_complete, is_cancelled) = (round.missing == 0, round.is_cancelled);
        let wakes = is_complete || round.differs.is_some();
        state.peers[peer].waiting = waiting;
        if is_complete && is_cancelled {
            take(&mut state, key);
        } else if wakes {
            self.changed.notify_all();
        }
    }

    /// A peer's group has failed.
    pub fn peer_ended(&self, peer: usize, error: CommError) {
        let mut state = self.state.lock();
        state.peers[peer].state = PeerState::Ended;
        self.end(&mut state, error, false);
    }

    /// A peer left in peace: whoever still waits for it waits in vain.
    pub fn peer_left(&self, peer: usize) {
        let state = &mut self.state.lock().peers[peer].state;
        if *state == PeerState::Present {
            *state = PeerState::Left;
        }
        self.changed.notify_all();
    }

    /// The connection to a peer has ended.
    pub fn peer_lost(&self, peer: usize, reason: String) {
        let mut state = self.state.lock();
        // A rank that has left does not mind; one that was told the reason knows better.
        if state.peers[peer].state == PeerState::Present {
            state.peers[peer].state = PeerState::Ended;
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
                let _ = queue.send(Outgoing::leave());
            }
        }
        let limit = if state.failure.is_some() { LEAVE_AFTER_FAILURE } else { LEAVE.min(self.timeout) };
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

    fn round<'a>(&self, state: &'a mut State, key: RoundKey) -> &'a mut Round {
        state.rounds.entry(key).or_insert_with(|| Round {
            ours: None,
            frames: (0..self.size).map(|_| None).collect(),
            missing: self.size - 1,
            differs: None,
            is_cancelled: false,
        })
    }
}

/// Removes a round; returns its frames.
fn take(state: &mut State, key: RoundKey) -> Vec<Option<Frame>> {
    let frames = state.rounds.remove(&key).map(|round| round.frames).unwrap_or_default();
    for (peer, frame) in frames.iter().enumerate() {
        state.peers[peer].waiting -= usize::from(frame.is_some());
    }
    frames
}
