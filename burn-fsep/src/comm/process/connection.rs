//! Connections between two ranks.

use std::{
    io::{self, BufReader, BufWriter, ErrorKind, Write},
    net::{Shutdown, TcpStream},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};

use super::{
    mailbox::Mailbox,
    message::{Message, Outgoing},
};

/// A rank's connections with all ranks, by rank; `None` for itself.
pub(super) type Connections = Vec<Option<TcpStream>>;

/// Pause between two looks at what may happen during the rendezvous.
pub(super) const POLL: Duration = Duration::from_millis(2);
/// What a rank tells rank 0 when it is connected to all others.
pub(super) const READY: u8 = b'R';

const BUFFER: usize = 64 << 10;
const STACK: usize = 256 << 10;
/// When a silent connection is tested, and how often before it is given up: 25 s in all.
const KEEP_ALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);
/// How long sent data may stay unacknowledged.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: Duration = Duration::from_secs(25);

/// What can be seen of a connection that does not block, without reading from it.
pub(super) enum Peek {
    Silent,
    Spoke,
    Ended(String),
}

pub(super) fn peek(stream: &TcpStream) -> Peek {
    match stream.peek(&mut [0]) {
        Ok(0) => Peek::Ended("it ended".into()),
        Ok(_) => Peek::Spoke,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Peek::Silent,
        Err(error) => Peek::Ended(error.to_string()),
    }
}

/// Starts the threads that read from and write to rank `peer`. Both end with the connection.
pub(super) fn start(
    mailbox: &Arc<Mailbox>,
    peer: usize,
    stream: TcpStream,
    queue: mpsc::Receiver<Outgoing>,
) -> io::Result<()> {
    prepare(&stream)?;
    let outgoing = stream.try_clone()?;
    let of_writer = mailbox.clone();
    spawn(format!("to-rank-{peer}"), move || {
        // What became of the peer shows on the other half of the connection.
        let _ = write(&outgoing, &queue);
        let _ = outgoing.shutdown(Shutdown::Write);
        of_writer.writer_ended();
    })?;
    let mailbox = mailbox.clone();
    spawn(format!("from-rank-{peer}"), move || {
        read(&mailbox, peer, stream);
        mailbox.reader_ended();
    })
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name).stack_size(STACK).spawn(run).map(drop)
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nodelay(true)?;
    let (time, interval, retries) = KEEP_ALIVE;
    let keep_alive = TcpKeepalive::new().with_time(time).with_interval(interval);
    #[cfg(unix)]
    let keep_alive = keep_alive.with_retries(retries);
    #[cfg(not(unix))]
    let _ = retries;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&keep_alive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}

/// Writes what is queued until the mailbox drops the queue.
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

fn read(mailbox: &Mailbox, peer: usize, stream: TcpStream) {
    let mut reader = BufReader::with_capacity(BUFFER, stream);
    loop {
        match Message::read(&mut reader) {
            Ok(Some(Message::Frame(key, frame))) => mailbox.deliver(key, peer, frame),
            Ok(Some(Message::End(error))) => mailbox.peer_ended(peer, error),
            Ok(Some(Message::Leave)) => mailbox.peer_left(peer),
            Ok(None) => return mailbox.peer_lost(peer, "its process ended without notice".into()),
            Err(error) => return mailbox.peer_lost(peer, describe(&error)),
        }
    }
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "its process ended without notice, in the middle of a message".into(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "its process ended without notice (reset)".into(),
        ErrorKind::TimedOut => "its machine does not answer any more".into(),
        ErrorKind::InvalidData => error.to_string(),
        _ => format!("the connection to it failed: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (stream, listener.accept().unwrap().0)
    }

    #[test]
    fn machines_that_vanish_are_noticed_by_the_operating_system() {
        let (stream, _peer) = pair();
        stream.set_read_timeout(Some(POLL)).unwrap();
        prepare(&stream).unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap() && stream.nodelay().unwrap());
        assert_eq!(stream.read_timeout().unwrap(), None);
        #[cfg(target_os = "linux")]
        {
            let (time, interval, retries) = KEEP_ALIVE;
            assert_eq!(socket.tcp_keepalive_time().unwrap(), time);
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), interval);
            assert_eq!(socket.tcp_keepalive_retries().unwrap(), retries);
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(UNACKNOWLEDGED));
        }
    }

    #[test]
    fn a_peek_takes_nothing() {
        let (stream, mut peer) = pair();
        stream.set_nonblocking(true).unwrap();
        assert!(matches!(peek(&stream), Peek::Silent));
        peer.write_all(&[1]).unwrap();
        while matches!(peek(&stream), Peek::Silent) {}
        assert!(matches!(peek(&stream), Peek::Spoke));
        drop(peer);
        assert!(matches!(peek(&stream), Peek::Spoke), "what was sent before the end comes first");
    }
}
