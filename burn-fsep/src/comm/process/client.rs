//! The other ranks' side of the rendezvous.

use std::{
    io::{self, ErrorKind, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use super::{
    ProcessConfig, RendezvousError,
    acceptor::Acceptor,
    connection::{Connections, POLL, Peek, READY, peek},
    error::system,
    handshake::{Hello, Notice},
    message::Outgoing,
    wire,
};
use crate::comm::CommError;

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
    Refused(RendezvousError),
}

impl From<io::Error> for Attempt {
    fn from(error: io::Error) -> Self {
        Attempt::Again(error.to_string())
    }
}

/// Connects to rank 0, learns from it where the others listen, and connects to each of them.
pub(super) fn join(config: &ProcessConfig) -> Result<Connections, RendezvousError> {
    let (control, listener) = reach_rank_0(config)?;
    let mut client = Client { config, control };
    let Notice::Peers(addresses) = client.notice()? else { return Err(confused()) };
    let mut peers = client.connect_peers(listener, &addresses)?;
    client.control.write_all(&[READY]).map_err(|error| lost(0, error.to_string()))?;
    let go = client.notice().and_then(|notice| if notice == Notice::Go { Ok(()) } else { Err(confused()) });
    go.inspect_err(|error| tell_peers(&mut peers, error))?;
    let control = std::iter::once(Some(client.control));
    Ok(control.chain(peers.into_iter().skip(1)).collect())
}

/// Peers may have heard already that all are connected: then they take this rank's end for a loss, unless it says whose it was.
fn tell_peers(peers: &mut Connections, error: &RendezvousError) {
    let RendezvousError::Lost { rank, reason } = error else { return };
    let (rank, operation, reason) = (*rank, "waiting for its peers".into(), reason.clone());
    let end = Outgoing::end(&CommError::PeerFailed { rank, operation, reason, lost: true });
    for peer in peers.iter_mut().flatten() {
        // Fits any socket's buffer.
        let _ = end.write(peer);
    }
}

fn reach_rank_0(config: &ProcessConfig) -> Result<(TcpStream, TcpListener), RendezvousError> {
    let start = Instant::now();
    let addresses = config.resolve()?;
    loop {
        let mut last = String::new();
        for address in &addresses {
            match attempt(config, *address) {
                Ok(connected) => return Ok(connected),
                Err(Attempt::Refused(error)) => return Err(error),
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
    stream.write_all(&wire::encode(&hello))?;
    match Notice::read(&mut stream, config.world_size) {
        Ok(Notice::Welcome) => Ok((stream, listener)),
        Ok(Notice::Failed(error)) => Err(Attempt::Refused(error)),
        Ok(_) => Err(Attempt::Again("it answered out of turn".into())),
        Err(error) => Err(match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Attempt::Again("it does not answer".into()),
            ErrorKind::UnexpectedEof => Attempt::Again("it closed the connection".into()),
            _ => error.into(),
        }),
    }
}

/// A rank that rank 0 has welcomed.
struct Client<'a> {
    config: &'a ProcessConfig,
    control: TcpStream,
}

impl Client<'_> {
    /// Rank 0's next notice. Rank 0 gives up before this rank does.
    fn notice(&mut self) -> Result<Notice, RendezvousError> {
        let limit = self.config.rendezvous_timeout.saturating_add(MARGIN);
        self.control.set_nonblocking(false).map_err(system("connection to rank 0"))?;
        self.control.set_read_timeout(Some(limit)).map_err(system("connection to rank 0"))?;
        match Notice::read(&mut self.control, self.config.world_size) {
            Ok(Notice::Failed(error)) => Err(error),
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
            Peek::Spoke | Peek::Ended(_) => Err(self.notice().err().unwrap_or_else(confused)),
        }
    }

    /// Connects to the lower ranks and is connected to by the higher ones. All of them listen already.
    fn connect_peers(
        &mut self,
        listener: TcpListener,
        addresses: &[SocketAddr],
    ) -> Result<Connections, RendezvousError> {
        let (config, start) = (self.config, Instant::now());
        self.control.set_nonblocking(true).map_err(system("connection to rank 0"))?;
        let mut peers: Connections = addresses.iter().map(|_| None).collect();
        for rank in 1..config.rank {
            peers[rank] = Some(self.connect_peer(rank, addresses[rank], start)?);
        }
        let mut acceptor = Acceptor::new(listener, &config.token, config.world_size)?;
        loop {
            let is_busy = acceptor.turn(|hello, stream| {
                let rank = hello.rank as usize;
                if rank <= config.rank || peers[rank].is_some() {
                    return Err(stream);
                }
                peers[rank] = Some(stream);
                Ok(())
            });
            let missing: Vec<usize> =
                (config.rank + 1..config.world_size).filter(|&rank| peers[rank].is_none()).collect();
            if missing.is_empty() {
                self.control.set_nonblocking(false).map_err(system("connection to rank 0"))?;
                return Ok(peers);
            }
            self.check_rank_0()?;
            if start.elapsed() >= config.rendezvous_timeout {
                let waited = config.rendezvous_timeout;
                return Err(RendezvousError::Missing { missing, waited, refused: acceptor.refused });
            }
            if !is_busy {
                std::thread::sleep(POLL);
            }
        }
    }

    /// Connects to a lower rank and says hello. It does not answer: rank 0 tells when all ranks have found each other.
    fn connect_peer(&mut self, rank: usize, address: SocketAddr, start: Instant) -> Result<TcpStream, RendezvousError> {
        let config = self.config;
        let hello = wire::encode(&Hello::new(config.rank, config.world_size, 0, &config.token));
        loop {
            let left = config.rendezvous_timeout.saturating_sub(start.elapsed());
            let connected = TcpStream::connect_timeout(&address, left.clamp(POLL, ATTEMPT));
            let greeted = connected.and_then(|mut stream| stream.write_all(&hello).map(|()| stream));
            let reason = match greeted {
                Ok(stream) => return Ok(stream),
                Err(error) => error.to_string(),
            };
            self.check_rank_0()?;
            if left.is_zero() {
                let (address, waited) = (address.to_string(), config.rendezvous_timeout);
                return Err(RendezvousError::Unreachable { rank, address, waited, reason });
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn confused() -> RendezvousError {
    lost(0, "it spoke out of turn".into())
}

fn lost(rank: usize, reason: String) -> RendezvousError {
    RendezvousError::Lost { rank, reason }
}
