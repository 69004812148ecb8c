//! What ranks that are threads and ranks that are connected by TCP have in common: each brings its part of a collective to a
//! round and waits for the others' parts.

mod communicator;
mod group_ranks;
mod round;
mod state;

pub use communicator::RoundsCommunicator;
pub(super) use round::{Part, RoundKey};
pub(super) use state::Rounds;
