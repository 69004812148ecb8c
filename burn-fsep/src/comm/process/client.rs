//! The other ranks' side of the rendezvous.

use std::{
    io::{self, ErrorKind, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use super::{
    ProcessConfig, RendezvousError,
    acceptor::Acceptor,
    error::system,
    handshake::{Hello, VERSION},
    link::{Links, POLL, Peek, READY, peek},
    notice::{Notice, Refusal},
};

/// How long one attempt to connect, or an answer, may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pause between attempts.
const PAUSE: Duration = Duration::from_millis(50);
/// How much longer than rank 0 this rank waits, so that rank 0 can say who is missing.
const MARGIN: Duration = Duration::from_secs(5);

/// Why an attempt to connect failed.
enum Attempt {
    /// It may succeed later.
    Again(String),
    Refused(Refusal),
}

impl From<io::Error> for Attempt {
    fn from(error: io::Error) -> Self {
        Attempt::Again(error.to_string())
    }
}

/// Connects to rank 0, learns from it where the others listen, and connects to each of them.
pub(super) fn join(config: &ProcessConfig) -> Result<Links, RendezvousError> {
    let (control, listener) = reach_rank_0(config)?;
    let mut client = Client { config, control };
    let Notice::Peers(addresses) = client.notice()? else { return Err(client.confused()) };
    let links = client.mesh(listener, &addresses)?;
    client.control.write_all(&[READY]).map_err(|error| lost(0, error.to_string()))?;
    let Notice::Go = client.notice()? else { return Err(client.confused()) };
    let control = std::iter::once(Some(client.control));
    Ok(control.chain(links.into_iter().skip(1)).collect())
}

fn reach_rank_0(config: &ProcessConfig) -> Result<(TcpStream, TcpListener), RendezvousError> {
    let start = Instant::now();
    let addresses = config.resolve()?;
    loop {
        let mut last = String::new();
        for address in &addresses {
            match attempt(config, *address) {
                Ok(connected) => return Ok(connected),
                Err(Attempt::Refused(refusal)) => return Err(refused(config, refusal)),
                Err(Attempt::Again(reason)) => last = reason,
            }
        }
        if start.elapsed() >= config.rendezvous_timeout {
            let (address, waited) = (config.address(), config.rendezvous_timeout);
            return Err(RendezvousError::Unreachable { rank: 0, address, waited, reason: last });
        }
        std::thread::sleep(PAUSE);
    }
}

/// One attempt to be welcomed by rank 0; also opens the socket on which this rank listens for its peers, at the address from
/// which it reaches rank 0 and at no other.
fn attempt(config: &ProcessConfig, address: SocketAddr) -> Result<(TcpStream, TcpListener), Attempt> {
    let mut stream = TcpStream::connect_timeout(&address, ATTEMPT)?;
    let own = stream.local_addr()?;
    if own == address {
        // Where nobody listens yet, TCP may connect a socket with itself.
        return Err(Attempt::Again("nobody listens there".into()));
    }
    let listener = TcpListener::bind((own.ip(), 0))?;
    let hello = Hello::new(config.rank, config.world_size, listener.local_addr()?.port(), &config.token);
    stream.set_read_timeout(Some(ATTEMPT))?;
    stream.write_all(&hello.encode())?;
    match Notice::read(&mut stream, config.world_size) {
        Ok(Notice::Welcome) => Ok((stream, listener)),
        Ok(Notice::Refused(refusal)) => Err(Attempt::Refused(refusal)),
        Ok(_) => Err(Attempt::Again("it answered out of turn".into())),
        Err(error) => Err(match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Attempt::Again("it does not answer".into()),
            ErrorKind::UnexpectedEof => Attempt::Again("it closed the connection".into()),
            _ => error.into(),
        }),
    }
}

fn refused(config: &ProcessConfig, refusal: Refusal) -> RendezvousError {
    match refusal {
        Refusal::Version(theirs) => RendezvousError::Version { ours: VERSION, theirs },
        Refusal::Token => RendezvousError::WrongToken,
        Refusal::WorldSize(theirs) => RendezvousError::WorldSize { ours: config.world_size, theirs: theirs as usize },
        Refusal::DuplicateRank | Refusal::UnexpectedRank => RendezvousError::DuplicateRank { rank: config.rank },
    }
}

/// A rank that rank 0 has welcomed.
struct Client<'a> {
    config: &'a ProcessConfig,
    control: TcpStream,
}

/// How far the connection to a lower rank is.
enum Lower {
    Absent(String),
    Greeted(TcpStream),
    Welcomed(TcpStream),
}

impl Client<'_> {
    /// Rank 0's next notice. Rank 0 gives up before this rank does.
    fn notice(&mut self) -> Result<Notice, RendezvousError> {
        let limit = self.config.rendezvous_timeout.saturating_add(MARGIN);
        self.control.set_nonblocking(false).map_err(system("connection to rank 0"))?;
        self.control.set_read_timeout(Some(limit)).map_err(system("connection to rank 0"))?;
        match Notice::read(&mut self.control, self.config.world_size) {
            Ok(Notice::Lost(rank)) => Err(lost(rank, "rank 0 says so".into())),
            Ok(Notice::Missing(missing)) => {
                let waited = self.config.rendezvous_timeout;
                Err(RendezvousError::Missing { missing, waited, refused: None })
            }
            Ok(notice) => Ok(notice),
            Err(error) => Err(match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => lost(0, format!("it was silent for {limit:?}")),
                ErrorKind::UnexpectedEof => lost(0, "it ended".into()),
                _ => lost(0, error.to_string()),
            }),
        }
    }

    /// Rank 0 says something only if the rendezvous is off.
    fn check_rank_0(&mut self) -> Result<(), RendezvousError> {
        match peek(&self.control) {
            Peek::Silent => Ok(()),
            Peek::Spoke | Peek::Ended(_) => Err(self.notice().err().unwrap_or_else(|| self.confused())),
        }
    }

    fn confused(&self) -> RendezvousError {
        lost(0, "it spoke out of turn".into())
    }

    /// Connects to the lower ranks and is connected to by the higher ones.
    fn mesh(&mut self, listener: TcpListener, addresses: &[SocketAddr]) -> Result<Links, RendezvousError> {
        let config = self.config;
        let start = Instant::now();
        let mut acceptor = Acceptor::new(listener, &config.token, config.world_size)?;
        let mut higher: Links = addresses.iter().map(|_| None).collect();
        let mut lower: Vec<Lower> = (1..config.rank).map(|_| Lower::Absent(String::new())).collect();
        // The lower rank that is looked at first.
        let mut first = 0;
        self.control.set_nonblocking(true).map_err(system("connection to rank 0"))?;
        loop {
            let busy = acceptor.turn(|hello, mut stream| {
                let rank = hello.rank as usize;
                if rank <= config.rank {
                    return Err((Refusal::UnexpectedRank, stream));
                }
                if higher[rank].is_some() {
                    return Err((Refusal::DuplicateRank, stream));
                }
                // Fits any socket's buffer.
                if stream.write_all(&Notice::Welcome.encode()).is_ok() {
                    higher[rank] = Some(stream);
                }
                Ok(())
            });
            let left = config.rendezvous_timeout.saturating_sub(start.elapsed());
            // An attempt that fails may take long: after it, first look at everything else, and next time at the ranks after it.
            let (begin, mut has_failed) = (first, false);
            for index in (0..lower.len()).map(|i| (begin + i) % (config.rank - 1)) {
                if has_failed && matches!(lower[index], Lower::Absent(_)) {
                    continue;
                }
                let now = std::mem::replace(&mut lower[index], Lower::Absent(String::new()));
                let limit = left.clamp(POLL, ATTEMPT);
                lower[index] =
                    self.advance(now, addresses[index + 1], limit).map_err(|refusal| refused(config, refusal))?;
                if !has_failed && matches!(lower[index], Lower::Absent(_)) {
                    (has_failed, first) = (true, index + 1);
                }
            }
            let is_late = |rank: usize| match rank < config.rank {
                true => !matches!(lower[rank - 1], Lower::Welcomed(_)),
                false => higher[rank].is_none(),
            };
            let missing: Vec<usize> =
                (1..config.world_size).filter(|&rank| rank != config.rank && is_late(rank)).collect();
            if missing.is_empty() {
                self.control.set_nonblocking(false).map_err(system("connection to rank 0"))?;
                for (i, state) in lower.into_iter().enumerate() {
                    if let Lower::Welcomed(stream) = state {
                        higher[i + 1] = Some(stream);
                    }
                }
                return Ok(higher);
            }
            self.check_rank_0()?;
            if start.elapsed() >= config.rendezvous_timeout {
                let waited = config.rendezvous_timeout;
                let absent = |(i, state): (usize, &Lower)| match state {
                    Lower::Absent(reason) => Some((i + 1, reason.clone())),
                    Lower::Greeted(_) | Lower::Welcomed(_) => None,
                };
                return Err(match lower.iter().enumerate().find_map(absent) {
                    Some((rank, reason)) => {
                        RendezvousError::Unreachable { rank, address: addresses[rank].to_string(), waited, reason }
                    }
                    None => RendezvousError::Missing { missing, waited, refused: acceptor.refused },
                });
            }
            if !busy {
                std::thread::sleep(POLL);
            }
        }
    }

    /// Goes on with the connection to a lower rank; an attempt to connect takes at most `limit`.
    fn advance(&self, state: Lower, address: SocketAddr, limit: Duration) -> Result<Lower, Refusal> {
        let config = self.config;
        let greet = || -> io::Result<TcpStream> {
            let mut stream = TcpStream::connect_timeout(&address, limit)?;
            stream.set_read_timeout(Some(ATTEMPT))?;
            stream.write_all(&Hello::new(config.rank, config.world_size, 0, &config.token).encode())?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        };
        Ok(match state {
            Lower::Absent(_) => greet().map_or_else(|error| Lower::Absent(error.to_string()), Lower::Greeted),
            Lower::Greeted(mut stream) => match peek(&stream) {
                Peek::Silent => Lower::Greeted(stream),
                Peek::Ended(reason) => Lower::Absent(reason),
                Peek::Spoke => {
                    let answer =
                        stream.set_nonblocking(false).and_then(|()| Notice::read(&mut stream, config.world_size));
                    match answer {
                        Ok(Notice::Welcome) => Lower::Welcomed(stream),
                        Ok(Notice::Refused(refusal)) => return Err(refusal),
                        Ok(_) => Lower::Absent("it answered out of turn".into()),
                        // A flood of strangers pushed this rank out, or the other one is lost, which rank 0 tells.
                        Err(error) => Lower::Absent(error.to_string()),
                    }
                }
            },
            Lower::Welcomed(stream) => Lower::Welcomed(stream),
        })
    }
}

fn lost(rank: usize, reason: String) -> RendezvousError {
    RendezvousError::Lost { rank, reason }
}
