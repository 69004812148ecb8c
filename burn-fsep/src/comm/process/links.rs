use std::{
    io::{self, BufReader, BufWriter, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{
    ProcessCommunicator, RendezvousError,
    connection::{self, Connections},
    error::system,
    message::{Message, Outgoing},
};
use crate::comm::{CommError, rounds::Rounds};

const BUFFER: usize = 64 << 10;
const STACK: usize = 256 << 10;
/// How long a rank that leaves waits until its peers have received everything.
const LEAVE: Duration = Duration::from_secs(30);
/// As above, if the group has failed.
const LEAVE_AFTER_FAILURE: Duration = Duration::from_secs(2);

/// What is to be sent to the other processes of a group.
pub(in crate::comm) struct Links {
    /// This one.
    rank: usize,
    /// By rank; `None` for this one, and empty after it has left.
    queues: Mutex<Vec<Option<mpsc::Sender<Outgoing>>>>,
    has_left: AtomicBool,
    timeout: Duration,
    threads: Mutex<Threads>,
    changed: Condvar,
}

/// Threads that still run.
struct Threads {
    writers: usize,
    readers: usize,
}

/// The communicator of a rank that is connected to all others: two threads for each connection.
pub(super) fn connect(
    rank: usize,
    connections: Connections,
    timeout: Duration,
) -> Result<ProcessCommunicator, RendezvousError> {
    let (mut queues, mut streams) = (Vec::new(), Vec::new());
    for stream in connections {
        let (sender, receiver) = mpsc::channel();
        queues.push(stream.is_some().then_some(sender));
        streams.push(stream.map(|stream| (stream, receiver)));
    }
    let (size, running) = (queues.len(), streams.iter().flatten().count());
    let links = Arc::new(Links {
        rank,
        queues: Mutex::new(queues),
        has_left: AtomicBool::new(false),
        timeout,
        threads: Mutex::new(Threads { writers: running, readers: running }),
        changed: Condvar::new(),
    });
    let tell = links.clone();
    let rounds = Arc::new(Rounds::new(size, 1, timeout, move |error| tell.tell(error)));
    let comm = ProcessCommunicator::new(rounds.clone(), rank, size, Some(links.clone()));
    for (peer, link) in streams.into_iter().enumerate() {
        let Some((stream, queue)) = link else { continue };
        if let Err(error) = links.start(&rounds, peer, stream, queue) {
            let reason = format!("no threads for its connections: {error}");
            rounds.fail(CommError::PeerFailed { rank, operation: "start".into(), reason, lost: false });
            return Err(system("threads for the connections")(error));
        }
    }
    Ok(comm)
}

impl Links {
    /// Starts the threads that read from and write to rank `peer`. Both end with the connection.
    fn start(
        self: &Arc<Self>,
        rounds: &Arc<Rounds>,
        peer: usize,
        stream: TcpStream,
        queue: mpsc::Receiver<Outgoing>,
    ) -> io::Result<()> {
        connection::prepare(&stream)?;
        let (outgoing, links) = (stream.try_clone()?, self.clone());
        spawn(format!("to-rank-{peer}"), move || {
            // What became of the peer shows on the other half of the connection.
            let _ = write(&outgoing, &queue);
            let _ = outgoing.shutdown(Shutdown::Write);
            links.threads.lock().writers -= 1;
            links.changed.notify_all();
        })?;
        let (links, rounds) = (self.clone(), rounds.clone());
        spawn(format!("from-rank-{peer}"), move || {
            links.read(&rounds, peer, stream);
            links.threads.lock().readers -= 1;
            links.changed.notify_all();
        })
    }

    fn read(&self, rounds: &Rounds, peer: usize, stream: TcpStream) {
        let mut reader = BufReader::with_capacity(BUFFER, stream);
        let lost = loop {
            match Message::read(&mut reader) {
                // Of a rank that has left nobody waits for anything.
                Ok(Some(Message::Part(..))) if self.has_left.load(Ordering::Relaxed) => {}
                Ok(Some(Message::Part(key, part))) => rounds.deliver(key, peer, part),
                Ok(Some(Message::End(error))) => rounds.rank_failed(self.rank, peer, error),
                Ok(Some(Message::Leave)) => rounds.leave(peer),
                Ok(None) => break "its process ended without notice".into(),
                Err(error) => break connection::describe(&error),
            }
        };
        if !self.has_left.load(Ordering::Relaxed) {
            rounds.rank_lost(peer, lost);
        }
    }

    /// Sends ranks of the world their messages; one for this rank itself is not sent.
    pub fn send(&self, messages: impl IntoIterator<Item = (usize, Outgoing)>) {
        let queues = self.queues.lock();
        for (rank, message) in messages {
            // Without its writer, the peer is gone, which shows.
            let _ = queues.get(rank).and_then(Option::as_ref).map(|queue| queue.send(message));
        }
    }

    fn tell(&self, error: &CommError) {
        let size = self.queues.lock().len();
        self.send((0..size).map(|rank| (rank, Outgoing::end(error))));
    }

    /// Leaves the group and waits, for a limited time, until what was sent to the peers is on its way. Nothing if it has left.
    pub fn leave(&self, has_failed: impl Fn() -> bool) {
        if self.has_left.swap(true, Ordering::Relaxed) {
            return;
        }
        for queue in std::mem::take(&mut *self.queues.lock()).into_iter().flatten() {
            let _ = queue.send(Outgoing::leave());
        }
        let limit = if has_failed() { LEAVE_AFTER_FAILURE } else { LEAVE.min(self.timeout) };
        let deadline = Instant::now() + limit;
        let mut threads = self.threads.lock();
        // What a peer sends to a process that has ended makes its system throw away what this rank has sent last: why it failed.
        // So this rank also reads until its peers, which learn of the failure, send nothing more.
        while threads.writers > 0 || threads.readers > 0 && has_failed() {
            if self.changed.wait_until(&mut threads, deadline).timed_out() {
                return;
            }
        }
    }
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name).stack_size(STACK).spawn(run).map(drop)
}

/// Writes what is queued until the rank leaves.
fn write(stream: &TcpStream, queue: &mpsc::Receiver<Outgoing>) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(BUFFER, stream);
    while let Ok(message) = queue.recv() {
        message.write(&mut writer)?;
        while let Ok(message) = queue.try_recv() {
            message.write(&mut writer)?;
        }
        writer.flush()?;
    }
    Ok(())
}
