//! Rank 0's side of the rendezvous.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use super::{
    ProcessConfig, RendezvousError,
    door::Door,
    error::system,
    hello::Hello,
    link::{Glance, Links, POLL, READY, glance},
    notice::{Notice, Refusal},
};

/// How long a rank may take to receive a notice.
const DELIVERY: Duration = Duration::from_secs(5);

/// How long rank 0 still tells ranks that come later that a rank was lost. Ranks that are started together come within it.
const LINGER: Duration = Duration::from_secs(5);

/// A rank that has come.
struct Seat {
    stream: TcpStream,
    /// Where it listens for its peers.
    address: SocketAddr,
    /// Whether it is connected to all its peers.
    ready: bool,
}

/// Waits for all other ranks, tells them of each other, and waits until they are connected.
pub(super) fn gather(config: &ProcessConfig) -> Result<Links, RendezvousError> {
    let listener = config.listen()?;
    let own = listener.local_addr().map_err(system("address of the listening socket"))?;
    let mut door = Door::new(listener, &config.token, config.world_size)?;
    let mut seats: Vec<Option<Seat>> = (0..config.world_size).map(|_| None).collect();
    let result =
        wait_for_ranks(config, &mut door, &mut seats).and_then(|()| introduce(config, own, &mut door, &mut seats));
    if let Err(error) = &result {
        call_off(error, &mut door, &mut seats);
    }
    result?;
    Ok(seats.into_iter().map(|seat| seat.map(|seat| seat.stream)).collect())
}

/// Tells all ranks, also those that come a little later, why the rendezvous is off.
fn call_off(error: &RendezvousError, door: &mut Door<'_>, seats: &mut [Option<Seat>]) {
    let (notice, linger) = match error {
        RendezvousError::Missing { missing, .. } => (Notice::Missing(missing.clone()), Duration::ZERO),
        RendezvousError::Lost { rank, .. } => (Notice::Lost(*rank), LINGER),
        _ => (Notice::Lost(0), Duration::ZERO),
    };
    let start = Instant::now();
    let mut told = vec![false; seats.len()];
    loop {
        for (seat, told) in seats.iter_mut().zip(&mut told) {
            if let Some(seat) = seat.as_mut().filter(|_| !*told) {
                let _ = tell(seat, &notice);
                *told = true;
            }
        }
        if seats[1..].iter().all(Option::is_some) || start.elapsed() >= linger {
            return;
        }
        if !door.turn(|hello, stream| seat(hello, stream, seats)) {
            std::thread::sleep(POLL);
        }
    }
}

fn wait_for_ranks(
    config: &ProcessConfig,
    door: &mut Door<'_>,
    seats: &mut [Option<Seat>],
) -> Result<(), RendezvousError> {
    let start = Instant::now();
    loop {
        let busy = door.turn(|hello, stream| seat(hello, stream, seats));
        let missing: Vec<usize> = (1..seats.len()).filter(|&rank| seats[rank].is_none()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        check_present(seats)?;
        if start.elapsed() >= config.rendezvous_timeout {
            let (waited, refused) = (config.rendezvous_timeout, door.refused.take());
            return Err(RendezvousError::Missing { missing, waited, refused });
        }
        if !busy {
            std::thread::sleep(POLL);
        }
    }
}

fn seat(hello: &Hello, stream: TcpStream, seats: &mut [Option<Seat>]) -> Result<(), (Refusal, TcpStream)> {
    let rank = hello.rank as usize;
    // Only what was seen is believed: a rank cannot send its peers to another machine.
    let Ok(from) = stream.peer_addr() else { return Ok(()) };
    if rank == 0 || seats[rank].is_some() {
        return Err((Refusal::DuplicateRank, stream));
    }
    let address = SocketAddr::new(from.ip().to_canonical(), hello.port);
    let seat = seats[rank].insert(Seat { stream, address, ready: false });
    // A rank that cannot be told has gone, which shows.
    let _ = tell(seat, &Notice::Welcome);
    Ok(())
}

/// Tells all ranks where the others listen, and waits until they are connected.
fn introduce(
    config: &ProcessConfig,
    own: SocketAddr,
    door: &mut Door<'_>,
    seats: &mut [Option<Seat>],
) -> Result<(), RendezvousError> {
    let peers = Notice::Peers(seats.iter().map(|seat| seat.as_ref().map_or(own, |seat| seat.address)).collect());
    tell_all(seats, &peers)?;
    let start = Instant::now();
    loop {
        door.turn(|_, stream| Err((Refusal::DuplicateRank, stream)));
        let mut missing = Vec::new();
        for (rank, seat) in seats.iter_mut().enumerate() {
            let Some(seat) = seat.as_mut().filter(|seat| !seat.ready) else { continue };
            let mut byte = [0];
            match seat.stream.read(&mut byte) {
                Ok(1) if byte[0] == READY => seat.ready = true,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    missing.push(rank);
                }
                Ok(_) => return Err(lost(rank, "it ended".into())),
                Err(error) => return Err(lost(rank, error.to_string())),
            }
        }
        if missing.is_empty() {
            return tell_all(seats, &Notice::Go);
        }
        check_present(seats)?;
        if start.elapsed() >= config.rendezvous_timeout {
            return Err(RendezvousError::Missing { missing, waited: config.rendezvous_timeout, refused: None });
        }
        std::thread::sleep(POLL);
    }
}

fn check_present(seats: &[Option<Seat>]) -> Result<(), RendezvousError> {
    for (rank, seat) in seats.iter().enumerate() {
        if let Some(Glance::Ended(reason)) = seat.as_ref().map(|seat| glance(&seat.stream)) {
            return Err(lost(rank, reason));
        }
    }
    Ok(())
}

fn tell_all(seats: &mut [Option<Seat>], notice: &Notice) -> Result<(), RendezvousError> {
    for (rank, seat) in seats.iter_mut().enumerate() {
        if let Some(seat) = seat {
            tell(seat, notice).map_err(|error| lost(rank, error.to_string()))?;
        }
    }
    Ok(())
}

fn tell(seat: &mut Seat, notice: &Notice) -> std::io::Result<()> {
    seat.stream.set_nonblocking(false)?;
    seat.stream.set_write_timeout(Some(DELIVERY))?;
    seat.stream.write_all(&notice.encode())?;
    seat.stream.set_nonblocking(true)
}

fn lost(rank: usize, reason: String) -> RendezvousError {
    RendezvousError::Lost { rank, reason }
}
