use std::{
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    sync::Arc,
    time::Duration,
};

use super::{JobToken, RendezvousError};

/// Every pair of ranks has a connection and every connection two threads.
pub(super) const MAX_WORLD_SIZE: usize = 1024;

/// Configuration of a rank's [`ProcessCommunicator`](super::ProcessCommunicator).
#[derive(Debug, Clone)]
pub struct ProcessConfig {
    /// This rank, `0..world_size`.
    pub rank: usize,
    /// World size `N`.
    pub world_size: usize,
    /// Host and port at which rank 0 listens, equal on all ranks; the host is also the only address that it listens on.
    pub master: (String, u16),
    /// The job's secret, equal on all ranks.
    pub token: JobToken,
    /// How long a collective waits for its peers.
    pub timeout: Duration,
    /// How long the ranks wait for each other at the start.
    pub rendezvous_timeout: Duration,
    listener: Option<Arc<TcpListener>>,
}

impl ProcessConfig {
    /// Rank `rank` of `world_size`, of which rank 0 listens at `master` (host and port).
    pub fn new(rank: usize, world_size: usize, master: (impl Into<String>, u16), token: JobToken) -> Self {
        Self {
            rank,
            world_size,
            master: (master.0.into(), master.1),
            token,
            timeout: Duration::from_secs(30),
            rendezvous_timeout: Duration::from_secs(30),
            listener: None,
        }
    }

    /// Sets how long a collective waits for its peers (30 s by default); [`Duration::MAX`] is for ever.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets how long the ranks wait for each other at the start (30 s by default); raise it where a scheduler starts them
    /// far apart.
    pub fn with_rendezvous_timeout(mut self, timeout: Duration) -> Self {
        self.rendezvous_timeout = timeout;
        self
    }

    /// Lets rank 0 listen on a socket that is bound already, for example to a port that the system chose.
    pub fn with_listener(mut self, listener: TcpListener) -> Self {
        self.listener = Some(Arc::new(listener));
        self
    }

    /// The address of rank 0, for messages.
    pub(super) fn address(&self) -> String {
        format!("{}:{}", self.master.0, self.master.1)
    }

    pub(super) fn resolve(&self) -> Result<Vec<SocketAddr>, RendezvousError> {
        let (host, port) = &self.master;
        let unknown = |reason: String| RendezvousError::Address { address: self.address(), reason };
        let addresses = (host.as_str(), *port).to_socket_addrs().map_err(|error| unknown(error.to_string()))?;
        let addresses: Vec<_> = addresses.collect();
        if addresses.is_empty() { Err(unknown("it has no address".into())) } else { Ok(addresses) }
    }

    /// Rank 0's listening socket.
    pub(super) fn listen(&self) -> Result<TcpListener, RendezvousError> {
        let bind =
            |reason: std::io::Error| RendezvousError::Bind { address: self.address(), reason: reason.to_string() };
        match &self.listener {
            Some(listener) => listener.try_clone().map_err(bind),
            None => TcpListener::bind(self.resolve()?.as_slice()).map_err(bind),
        }
    }
}
