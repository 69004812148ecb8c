use thiserror::Error;

/// Why a collective did not complete. All ranks of a group get one, within the group's timeout.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
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
    },
    /// Some ranks did not come in time.
    #[error(
        "`{operation}` timed out after {waited:?}: rank(s) {missing:?} did not take part; they hang, were killed \
         without notice, or do not reach this operation at all (an FSEP layer that is not connected to their loss?)"
    )]
    Timeout {
        /// The operation that timed out.
        operation: String,
        /// How long this rank waited.
        waited: std::time::Duration,
        /// The ranks that did not come.
        missing: Vec<usize>,
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
}
