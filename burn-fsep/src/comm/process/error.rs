use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why the processes of a job could not be brought together.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RendezvousError {
    /// A rank or world size that cannot be.
    #[error("rank {rank} of {world_size}: ranks are 0 to world size - 1, and {max} the largest world size")]
    InvalidRank {
        /// The rank.
        rank: usize,
        /// The world size.
        world_size: usize,
        /// The largest world size.
        max: usize,
    },
    /// The address of rank 0 means nothing.
    #[error("the address of rank 0, `{address}`, cannot be resolved: {reason}; check MASTER_ADDR and MASTER_PORT")]
    Address {
        /// The address.
        address: String,
        /// What the resolver said.
        reason: String,
    },
    /// Rank 0 cannot listen.
    #[error(
        "cannot listen on `{address}`: {reason}; MASTER_ADDR has to be an address of rank 0's machine, and MASTER_PORT \
         a free port"
    )]
    Bind {
        /// The address.
        address: String,
        /// What the operating system said.
        reason: String,
    },
    /// A rank did not answer.
    #[error(
        "rank {rank} could not be reached at `{address}` for {waited:?}: {reason}; is it running, and is this its address?"
    )]
    Unreachable {
        /// The rank.
        rank: usize,
        /// Its address.
        address: String,
        /// How long it was tried.
        waited: Duration,
        /// What happened last.
        reason: String,
    },
    /// The peer is built from another version.
    #[error("the ranks speak different protocol versions: this one {ours}, its peer {theirs}; start one build on all")]
    Version {
        /// This rank's version.
        ours: u32,
        /// The peer's version.
        theirs: u32,
    },
    /// The token is that of another job.
    #[error("the job token was refused: another job uses this address, or BURN_FSEP_TOKEN differs between the ranks")]
    WrongToken,
    /// Ranks were started with different world sizes.
    #[error("this rank was started with world size {ours}, its peer with {theirs}")]
    WorldSize {
        /// This rank's world size.
        ours: usize,
        /// The peer's world size.
        theirs: usize,
    },
    /// Two processes say that they are one rank.
    #[error("another process has joined as rank {rank} already: two processes were started with one rank")]
    DuplicateRank {
        /// The rank.
        rank: usize,
    },
    /// Some ranks did not come in time.
    #[error("rank(s) {missing:?} did not come within {waited:?}: were they started, with this address?{}", note(.refused))]
    Missing {
        /// The ranks that did not come.
        missing: Vec<usize>,
        /// How long rank 0 waited.
        waited: Duration,
        /// Why the last of the connections that were turned away was, where that is known.
        refused: Option<String>,
    },
    /// A rank ended during the rendezvous.
    #[error("rank {rank} was lost while the ranks were connecting: {reason}")]
    Lost {
        /// The rank.
        rank: usize,
        /// How it was noticed.
        reason: String,
    },
    /// The operating system refused something that the engine needs.
    #[error("{what}: {reason}")]
    System {
        /// What was attempted.
        what: String,
        /// What the operating system said.
        reason: String,
    },
}

fn note(refused: &Option<String>) -> String {
    refused.as_ref().map(|reason| format!(" The last connection refused: {reason}")).unwrap_or_default()
}

/// For `map_err`: the operating system refused `what`.
pub(super) fn system(what: &str) -> impl Fn(std::io::Error) -> RendezvousError + '_ {
    move |error| RendezvousError::System { what: what.to_string(), reason: error.to_string() }
}
