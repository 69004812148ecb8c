use std::{
    io::{self, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use super::{
    JobToken, RendezvousError,
    error::system,
    handshake::{Hello, Notice, Refusal},
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

    /// Goes on with what can go on now. `admit` says whether a rank of this job is expected here, and gets its connection,
    /// which does not block; whether anything happened.
    pub fn turn(&mut self, mut admit: impl FnMut(&Hello, TcpStream) -> Result<(), (Refusal, TcpStream)>) -> bool {
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
            let refusal = match self.check(&hello) {
                Ok(hello) => admit(hello, stream),
                Err(refusal) => Err((refusal, stream)),
            };
            if let Err((refusal, mut stream)) = refusal {
                self.refused = Some(describe(&hello, refusal));
                // Fits any socket's buffer; whoever does not read it has to guess.
                let _ = stream.write_all(&wire::encode(&Notice::Refused(refusal)));
            }
        }
        is_busy
    }

    fn check<'h>(&self, hello: &'h Result<Hello, OtherVersion>) -> Result<&'h Hello, Refusal> {
        let hello = hello.as_ref().map_err(|_| Refusal::Version(wire::VERSION))?;
        if hello.token != self.token.reveal() {
            return Err(Refusal::Token);
        }
        if hello.world_size as usize != self.world_size {
            return Err(Refusal::WorldSize(self.world_size as u32));
        }
        if hello.rank as usize >= self.world_size {
            return Err(Refusal::UnexpectedRank);
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

fn describe(hello: &Result<Hello, OtherVersion>, refusal: Refusal) -> String {
    match (hello, refusal) {
        (Err(OtherVersion(theirs)), _) => format!("protocol version {theirs}, this one has {}.", wire::VERSION),
        (Ok(hello), Refusal::WorldSize(ours)) => {
            format!("rank {} of {} ranks, this one expects {ours}.", hello.rank, hello.world_size)
        }
        (Ok(hello), Refusal::DuplicateRank) => format!("a second rank {}.", hello.rank),
        (Ok(hello), Refusal::UnexpectedRank) => format!("rank {}, which is not expected here.", hello.rank),
        (Ok(_), Refusal::Token | Refusal::Version(_)) => "a wrong job token.".into(),
    }
}
