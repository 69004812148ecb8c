//! What ranks that are threads and ranks that are connected by TCP have in common: each brings its part of a collective to a
//! round and waits for the others' parts.

mod communicator;
mod state;

pub use communicator::RoundsCommunicator;
pub(super) use state::{Part, RoundKey, Rounds};
