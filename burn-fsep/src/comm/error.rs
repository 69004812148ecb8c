use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Operation, process::RendezvousError};

/// Why a collective did not complete. All ranks of a group get one, within the group's timeout. Ranks are those of the world,
/// whichever of its groups the collective was of (see [`Communicator::world_rank`](super::Communicator::world_rank)).
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CommError {
    /// Another rank failed or left; this rank was in, or came to, the named operation.
    #[error("rank {rank} failed while this rank was in `{operation}`: {reason}")]
    PeerFailed {
        /// The rank that failed.
        rank: usize,
        /// What this rank was doing.
        operation: String,
        /// What the failing rank said, or how its loss was noticed.
        reason: String,
        /// Whether it is gone without saying why: it was killed, its machine is lost, or its program left the group.
        lost: bool,
    },
    /// Some ranks did not come in time.
    #[error(
        "`{operation}` timed out after {waited:?}: {} did not take part; they hang, were killed without notice, or do not \
         reach this operation at all (an FSEP layer that is not connected to their loss?){}",
        absent(missing),
        meanwhile.as_ref().map_or(String::new(), |what| format!(". Meanwhile {what}"))
    )]
    Timeout {
        /// The operation that timed out.
        operation: String,
        /// How long this rank waited.
        waited: std::time::Duration,
        /// The ranks that did not come; empty if the engine cannot tell.
        missing: Vec<usize>,
        /// Where one of them has come, and the rank that waits has not, if the engine can tell.
        meanwhile: Option<String>,
    },
    /// Ranks called different collectives, or the same one with different shapes.
    #[error(
        "ranks disagree on collective #{sequence}: rank {rank} is in `{operation}`, rank {peer} in \
         `{peer_operation}`; all ranks must run the same layers in the same order, also with no tokens"
    )]
    Mismatch {
        /// Number of the collective on its communicator.
        sequence: u64,
        /// A rank.
        rank: usize,
        /// What it does, with shapes.
        operation: String,
        /// A rank that does something else.
        peer: usize,
        /// What that one does.
        peer_operation: String,
    },
    /// A buffer or block does not fit the call.
    #[error("invalid argument to `{operation}`: {reason}")]
    InvalidArgument {
        /// The operation called.
        operation: String,
        /// What is wrong.
        reason: String,
    },
    /// The library or device that carries the group failed.
    #[error("`{operation}` failed: {reason}")]
    Engine {
        /// The operation called.
        operation: String,
        /// What the library said.
        reason: String,
    },
    /// The processes of the job did not come together.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
}

impl CommError {
    /// The failure of rank `rank`, which gives up for this reason.
    pub(super) fn aborted(rank: usize, reason: &str) -> Self {
        CommError::PeerFailed { rank, operation: "abort".into(), reason: reason.into(), lost: false }
    }

    /// What rank `rank` and rank `peer` do in a collective where they should do the same.
    pub(super) fn mismatch(sequence: u64, rank: usize, peer: usize, [ours, theirs]: [String; 2]) -> Self {
        CommError::Mismatch { sequence, rank, operation: ours, peer, peer_operation: theirs }
    }

    /// A group's failure as a rank in `operation` sees it.
    pub(crate) fn seen_from(&self, operation: &str) -> Self {
        match self {
            CommError::PeerFailed { rank, reason, lost, .. } => CommError::PeerFailed {
                rank: *rank,
                operation: operation.to_string(),
                reason: reason.clone(),
                lost: *lost,
            },
            other => other.clone(),
        }
    }
}

pub(super) fn invalid_argument(operation: Operation, reason: String) -> CommError {
    CommError::InvalidArgument { operation: operation.to_string(), reason }
}

/// Buffers are as long as the plan says; in bytes.
pub(super) fn check_buffer(operation: Operation, what: &str, len: usize, planned: usize) -> Result<(), CommError> {
    if len == planned {
        return Ok(());
    }
    Err(invalid_argument(operation, format!("{what} buffer of {len} bytes, plan of {planned}")))
}

/// The ranks that did not come, where the engine can tell.
fn absent(missing: &[usize]) -> String {
    if missing.is_empty() { "some rank(s)".into() } else { format!("rank(s) {missing:?}") }
}
