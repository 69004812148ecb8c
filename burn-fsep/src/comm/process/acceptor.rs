use std::{
    io::{self, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use super::{
    JobToken, RendezvousError,
    config::MAX_WORLD_SIZE,
    error::system,
    handshake::{Hello, Notice},
    wire,
};

/// How long a connection may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lets ranks of this job in, and nobody else: takes connections, reads their hellos and answers them. Never blocks.
pub(super) struct Acceptor<'a> {
    listener: TcpListener,
    token: &'a JobToken,
    world_size: usize,
    /// Connections that have not said yet who they are.
    waiting: Vec<(TcpStream, Instant)>,
    /// Why the last hello was refused.
    pub refused: Option<String>,
}

impl<'a> Acceptor<'a> {
    pub fn new(listener: TcpListener, token: &'a JobToken, world_size: usize) -> Result<Self, RendezvousError> {
        listener.set_nonblocking(true).map_err(system("listening for other ranks"))?;
        Ok(Self { listener, token, world_size, waiting: Vec::new(), refused: None })
    }

    /// Goes on with what can go on now. `admit` gets the connection of a rank of this job, which does not block, or gives it
    /// back if that rank has come before; whether anything happened.
    pub fn turn(&mut self, mut admit: impl FnMut(&Hello, TcpStream) -> Result<(), TcpStream>) -> bool {
        let before = self.waiting.len();
        // An error is that of the connection, or passes: too many open files.
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                self.waiting.push((stream, Instant::now()));
            }
        }
        let mut is_busy = self.waiting.len() > before;
        for (mut stream, since) in std::mem::take(&mut self.waiting) {
            let hello = match hear(&mut stream) {
                Ok(Some(hello)) => hello,
                Ok(None) if since.elapsed() <= PATIENCE => {
                    self.waiting.push((stream, since));
                    continue;
                }
                Ok(None) | Err(_) => continue,
            };
            is_busy = true;
            let admitted = match self.check(hello) {
                Ok(hello) => admit(&hello, stream).map_err(|stream| {
                    let rank = hello.rank as usize;
                    ((RendezvousError::DuplicateRank { rank }, format!("a second rank {rank}.")), stream)
                }),
                Err(refusal) => Err((refusal, stream)),
            };
            if let Err(((error, note), mut stream)) = admitted {
                self.refused = Some(note);
                // Fits any socket's buffer; whoever does not read it has to guess.
                let _ = stream.write_all(&wire::encode(&Notice::Failed(error)));
            }
        }
        is_busy
    }

    /// Whether it is a rank of this job; else its error and, for this rank's own, who it was.
    fn check(&self, hello: Result<Hello, OtherVersion>) -> Result<Hello, (RendezvousError, String)> {
        let (token, size, version) = (self.token.reveal(), self.world_size, wire::VERSION);
        let other_version = |OtherVersion(ours)| {
            let note = format!("protocol version {ours}, this one has {version}.");
            (RendezvousError::Version { ours, theirs: version }, note)
        };
        let hello = hello.map_err(other_version)?;
        let (rank, theirs) = (hello.rank as usize, hello.world_size as usize);
        if hello.token != token {
            return Err((RendezvousError::WrongToken, "a wrong job token.".into()));
        }
        if theirs != size {
            let note = format!("rank {rank} of {theirs} ranks, this one expects {size}.");
            return Err((RendezvousError::WorldSize { ours: theirs, theirs: size }, note));
        }
        if rank >= size {
            let error = RendezvousError::InvalidRank { rank, world_size: size, max: MAX_WORLD_SIZE };
            return Err((error, format!("rank {rank}, which is not expected here.")));
        }
        Ok(hello)
    }
}

/// The version of a rank that another build started: its hello may look differently.
struct OtherVersion(u32);

/// Takes a hello from a connection that does not block; `None` if it has not come yet.
///
/// # Errors
///
/// If the connection has ended, or says something else.
fn hear(stream: &mut TcpStream) -> io::Result<Option<Result<Hello, OtherVersion>>> {
    let mut bytes = [0; wire::HEADER + Hello::LIMIT];
    let peeked = match stream.peek(&mut bytes) {
        Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
        Ok(peeked) => peeked,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some((version, len)) = wire::header(&bytes[..peeked])? else { return Ok(None) };
    let end = wire::HEADER + len;
    if end > bytes.len() {
        return Err(wire::garbled());
    }
    if peeked < end {
        return Ok(None);
    }
    stream.read_exact(&mut bytes[..end])?;
    if version != wire::VERSION {
        return Ok(Some(Err(OtherVersion(version))));
    }
    wire::decode(&bytes[wire::HEADER..end]).map(|hello| Some(Ok(hello)))
}
