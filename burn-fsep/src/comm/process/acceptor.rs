use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::{
    JobToken, RendezvousError,
    error::system,
    handshake::{Hello, MAGIC, VERSION},
    notice::{Notice, Refusal},
};

/// How many connections may be waiting to say who they are. A rank says it at once, so whoever is pushed out is a stranger
/// or, in a flood, tries again.
const MAX_WAITING: usize = 256;
/// How many connections the operating system keeps until they are taken; beyond, peers have to try again.
const BACKLOG: i32 = 1024;
/// How many connections are taken before those waiting are looked at again.
const BATCH: usize = 64;
/// How long a connection may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lets ranks of this job in, and nobody else: takes connections, reads their hellos and answers them. Never blocks.
pub(super) struct Acceptor<'a> {
    listener: TcpListener,
    token: &'a JobToken,
    world_size: usize,
    waiting: VecDeque<Waiting>,
    /// Why the last hello was refused.
    pub refused: Option<String>,
}

struct Waiting {
    stream: TcpStream,
    hello: [u8; Hello::LEN],
    read: usize,
    since: Instant,
}

enum Progress {
    Reading,
    Gone,
    Complete,
}

impl Waiting {
    fn advance(&mut self) -> Progress {
        if self.since.elapsed() > PATIENCE {
            return Progress::Gone;
        }
        match self.stream.read(&mut self.hello[self.read..]) {
            Ok(0) => return Progress::Gone,
            Ok(read) => self.read += read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return Progress::Gone,
        }
        let start = self.read.min(MAGIC.len());
        match self.hello[..start] == MAGIC[..start] {
            false => Progress::Gone,
            true if self.read == Hello::LEN => Progress::Complete,
            true => Progress::Reading,
        }
    }
}

impl<'a> Acceptor<'a> {
    pub fn new(listener: TcpListener, token: &'a JobToken, world_size: usize) -> Result<Self, RendezvousError> {
        listener.set_nonblocking(true).map_err(system("listening for other ranks"))?;
        // All ranks may come at once, and strangers with them.
        SockRef::from(&listener).listen(BACKLOG).map_err(system("listening for other ranks"))?;
        Ok(Self { listener, token, world_size, waiting: VecDeque::new(), refused: None })
    }

    /// Goes on with what can go on now. `admit` says whether a rank of this job is expected here, and gets its connection,
    /// which does not block; whether anything happened.
    pub fn turn(&mut self, mut admit: impl FnMut(&Hello, TcpStream) -> Result<(), (Refusal, TcpStream)>) -> bool {
        let mut busy = false;
        for _ in 0..BATCH {
            // An error is that of the connection, or passes: too many open files.
            let Ok((stream, _)) = self.listener.accept() else { break };
            busy = true;
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.waiting.len() == MAX_WAITING {
                self.waiting.pop_front();
            }
            let hello = [0; Hello::LEN];
            self.waiting.push_back(Waiting { stream, hello, read: 0, since: Instant::now() });
        }
        for _ in 0..self.waiting.len() {
            let Some(mut waiting) = self.waiting.pop_front() else { break };
            match waiting.advance() {
                Progress::Reading => self.waiting.push_back(waiting),
                Progress::Gone => busy = true,
                Progress::Complete => {
                    busy = true;
                    let Some(hello) = Hello::decode(&waiting.hello) else { continue };
                    let answer = match self.check(&hello) {
                        Ok(()) => admit(&hello, waiting.stream),
                        Err(refusal) => Err((refusal, waiting.stream)),
                    };
                    if let Err((refusal, mut stream)) = answer {
                        self.refused = Some(self.describe(&hello, refusal));
                        // Fits any socket's buffer; whoever does not read it has to guess.
                        let _ = stream.write_all(&Notice::Refused(refusal).encode());
                    }
                }
            }
        }
        busy
    }

    fn check(&self, hello: &Hello) -> Result<(), Refusal> {
        if hello.version != VERSION {
            return Err(Refusal::Version(VERSION));
        }
        if !hello.has_token(self.token) {
            return Err(Refusal::Token);
        }
        if hello.world_size as usize != self.world_size {
            return Err(Refusal::WorldSize(self.world_size as u32));
        }
        if hello.rank as usize >= self.world_size {
            return Err(Refusal::UnexpectedRank);
        }
        Ok(())
    }

    fn describe(&self, hello: &Hello, refusal: Refusal) -> String {
        match refusal {
            Refusal::Version(ours) => format!("protocol version {}, this one has {ours}.", hello.version),
            Refusal::Token => "a wrong job token.".into(),
            Refusal::WorldSize(ours) => {
                format!("rank {} of {} ranks, this one expects {ours}.", hello.rank, hello.world_size)
            }
            Refusal::DuplicateRank => format!("a second rank {}.", hello.rank),
            Refusal::UnexpectedRank => format!("rank {}, which is not expected here.", hello.rank),
        }
    }
}
