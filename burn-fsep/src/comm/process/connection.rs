//! Connections between two ranks.

use std::{
    io::{self, ErrorKind},
    net::TcpStream,
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};

/// A rank's connections with all ranks, by rank; `None` for itself.
pub(super) type Connections = Vec<Option<TcpStream>>;

/// Pause between two looks at what may happen during the rendezvous.
pub(super) const POLL: Duration = Duration::from_millis(2);
/// What a rank tells rank 0 when it is connected to all others.
pub(super) const READY: u8 = b'R';

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

/// Lets the operating system notice machines that vanish.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
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

/// How the end of a connection shows.
pub(super) fn describe(error: &io::Error) -> String {
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
    use std::{io::Write, net::TcpListener};

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
