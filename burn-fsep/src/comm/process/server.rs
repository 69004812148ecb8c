//! Rank 0's side of the rendezvous.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use super::{
    ProcessConfig, RendezvousError,
    acceptor::Acceptor,
    connection::{Connections, POLL, Peek, READY, peek},
    error::system,
    handshake::{Hello, Notice},
    wire,
};

/// How long a rank may take to receive a notice.
const DELIVERY: Duration = Duration::from_secs(5);

/// How long rank 0 still tells ranks that come later that a rank was lost. Ranks that are started together come within it.
const LINGER: Duration = Duration::from_secs(5);

/// A rank that has come.
struct Member {
    stream: TcpStream,
    /// Where it listens for its peers.
    address: SocketAddr,
    /// Whether it is connected to all its peers.
    ready: bool,
}

/// Waits for all other ranks, tells them of each other, and waits until they are connected.
pub(super) fn gather(config: &ProcessConfig) -> Result<Connections, RendezvousError> {
    let listener = config.listen()?;
    let own = listener.local_addr().map_err(system("address of the listening socket"))?;
    let mut acceptor = Acceptor::new(listener, &config.token, config.world_size)?;
    let mut members: Vec<Option<Member>> = (0..config.world_size).map(|_| None).collect();
    let result = wait_for_ranks(config, &mut acceptor, &mut members)
        .and_then(|()| introduce(config, own, &mut acceptor, &mut members));
    if let Err(error) = &result {
        call_off(error, &mut acceptor, &mut members);
    }
    result?;
    Ok(members.into_iter().map(|member| member.map(|member| member.stream)).collect())
}

/// Tells all ranks, also those that come a little later, why the rendezvous is off.
fn call_off(error: &RendezvousError, acceptor: &mut Acceptor<'_>, members: &mut [Option<Member>]) {
    let linger = if matches!(error, RendezvousError::Lost { .. }) { LINGER } else { Duration::ZERO };
    let notice = Notice::Failed(match error {
        RendezvousError::Missing { .. } | RendezvousError::Lost { .. } => error.clone(),
        own => lost(0, own.to_string()),
    });
    let start = Instant::now();
    let mut told = vec![false; members.len()];
    loop {
        for (member, told) in members.iter_mut().zip(&mut told) {
            if let Some(member) = member.as_mut().filter(|_| !*told) {
                let _ = tell(member, &notice);
                *told = true;
            }
        }
        if members[1..].iter().all(Option::is_some) || start.elapsed() >= linger {
            return;
        }
        if !acceptor.turn(|hello, stream| admit(hello, stream, members)) {
            std::thread::sleep(POLL);
        }
    }
}

fn wait_for_ranks(
    config: &ProcessConfig,
    acceptor: &mut Acceptor<'_>,
    members: &mut [Option<Member>],
) -> Result<(), RendezvousError> {
    let start = Instant::now();
    loop {
        let busy = acceptor.turn(|hello, stream| admit(hello, stream, members));
        let missing: Vec<usize> = (1..members.len()).filter(|&rank| members[rank].is_none()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        check_present(members)?;
        if start.elapsed() >= config.rendezvous_timeout {
            let (waited, refused) = (config.rendezvous_timeout, acceptor.refused.take());
            return Err(RendezvousError::Missing { missing, waited, refused });
        }
        if !busy {
            std::thread::sleep(POLL);
        }
    }
}

fn admit(hello: &Hello, stream: TcpStream, members: &mut [Option<Member>]) -> Result<(), TcpStream> {
    let rank = hello.rank as usize;
    // Only what was seen is believed: a rank cannot send its peers to another machine.
    let Ok(from) = stream.peer_addr() else { return Ok(()) };
    if matches!(peek(&stream), Peek::Ended(_)) {
        // It did not want to wait for an answer, and comes again. Of a socket that listened before this rank looked, the
        // operating system keeps such connections.
        return Ok(());
    }
    if rank == 0 || members[rank].is_some() {
        return Err(stream);
    }
    let address = SocketAddr::new(from.ip().to_canonical(), hello.port);
    let member = members[rank].insert(Member { stream, address, ready: false });
    // A rank that cannot be told has gone, which shows.
    let _ = tell(member, &Notice::Welcome);
    Ok(())
}

/// Tells all ranks where the others listen, and waits until they are connected.
fn introduce(
    config: &ProcessConfig,
    own: SocketAddr,
    acceptor: &mut Acceptor<'_>,
    members: &mut [Option<Member>],
) -> Result<(), RendezvousError> {
    let peers =
        Notice::Peers(members.iter().map(|member| member.as_ref().map_or(own, |member| member.address)).collect());
    tell_all(members, &peers)?;
    let start = Instant::now();
    loop {
        acceptor.turn(|_, stream| Err(stream));
        let mut missing = Vec::new();
        for (rank, member) in members.iter_mut().enumerate() {
            let Some(member) = member.as_mut().filter(|member| !member.ready) else { continue };
            let mut byte = [0];
            match member.stream.read(&mut byte) {
                Ok(1) if byte[0] == READY => member.ready = true,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    missing.push(rank);
                }
                Ok(_) => return Err(lost(rank, "it ended".into())),
                Err(error) => return Err(lost(rank, error.to_string())),
            }
        }
        if missing.is_empty() {
            return tell_all(members, &Notice::Go);
        }
        check_present(members)?;
        if start.elapsed() >= config.rendezvous_timeout {
            return Err(RendezvousError::Missing { missing, waited: config.rendezvous_timeout, refused: None });
        }
        std::thread::sleep(POLL);
    }
}

fn check_present(members: &[Option<Member>]) -> Result<(), RendezvousError> {
    for (rank, member) in members.iter().enumerate() {
        if let Some(Peek::Ended(reason)) = member.as_ref().map(|member| peek(&member.stream)) {
            return Err(lost(rank, reason));
        }
    }
    Ok(())
}

fn tell_all(members: &mut [Option<Member>], notice: &Notice) -> Result<(), RendezvousError> {
    for (rank, member) in members.iter_mut().enumerate() {
        if let Some(member) = member {
            tell(member, notice).map_err(|error| lost(rank, error.to_string()))?;
        }
    }
    Ok(())
}

fn tell(member: &mut Member, notice: &Notice) -> std::io::Result<()> {
    member.stream.set_nonblocking(false)?;
    member.stream.set_write_timeout(Some(DELIVERY))?;
    member.stream.write_all(&wire::encode(notice))?;
    member.stream.set_nonblocking(true)
}

fn lost(rank: usize, reason: String) -> RendezvousError {
    RendezvousError::Lost { rank, reason }
}
