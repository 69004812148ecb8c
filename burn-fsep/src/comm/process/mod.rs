//! The process engine: ranks are processes, connected by TCP.
//!
//! It is the control group for NCCL, and a complete engine for ranks on the CPUs of one machine. On clusters it introduces
//! ranks and carries aborts; for data, take NCCL or MPI.
//!
//! # How ranks meet
//!
//! Rank 0 listens on the address that all ranks were given, and on no other. The others connect and say who they are;
//! then each pair of ranks connects. Ranks show a [`JobToken`], so that neither strangers nor ranks of another job get in;
//! nothing is encrypted, so the network has to be one that you trust. When the time runs out, the error names the ranks
//! that did not come.
//!
//! # How losses are noticed
//!
//! A process that ends without leaving closes its connections: all others know at once. A machine that vanishes is found by
//! TCP keep-alive and, on Linux, by unacknowledged data, within half a minute; a rank that hangs, by the collective's
//! timeout.

mod acceptor;
mod client;
mod config;
mod connection;
mod error;
mod handshake;
mod links;
pub(super) mod message;
mod rendezvous;
mod server;
mod token;
mod wire;

pub use config::ProcessConfig;
pub use error::RendezvousError;
pub(super) use links::Links;
pub use token::{JobToken, TokenError};

/// A rank's handle on a group of processes. See [`ProcessConfig`].
pub type ProcessCommunicator = super::RoundsCommunicator;
