//! How the ranks of a job meet.

use std::{fmt, panic::resume_unwind, sync::Arc};

use super::{ProcessCommunicator, ProcessConfig, RendezvousError, client, config::MAX_WORLD_SIZE, links, server};
use crate::comm::{CommError, Communicator};

impl ProcessConfig {
    /// Meets the other ranks and connects to each of them. Collective.
    ///
    /// # Errors
    ///
    /// Any [`RendezvousError`], on every rank within twice the rendezvous timeout and a few seconds; most of them at once.
    pub fn init(&self) -> Result<ProcessCommunicator, RendezvousError> {
        let Self { rank, world_size, .. } = *self;
        if rank >= world_size || world_size > MAX_WORLD_SIZE {
            return Err(RendezvousError::InvalidRank { rank, world_size, max: MAX_WORLD_SIZE });
        }
        let peers = match rank {
            _ if world_size == 1 => vec![None],
            0 => server::gather(self)?,
            _ => client::join(self)?,
        };
        links::connect(rank, peers, self.timeout)
    }

    /// Meets the other ranks, runs `program` as this rank, and leaves the group.
    ///
    /// If the program returns an error or panics, every other rank's current or next collective returns an error that
    /// says so; without this function they are told that this rank left, but not why.
    ///
    /// # Errors
    ///
    /// Those of [`init`](Self::init) and of `program`. Panics go on.
    pub fn run<T, E>(&self, program: impl FnOnce(Arc<dyn Communicator>) -> Result<T, E>) -> Result<T, E>
    where
        E: fmt::Display + From<CommError>,
    {
        let comm = Arc::new(self.init().map_err(CommError::from)?);
        match comm.run(program) {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }
}
