use std::{fmt, sync::Arc, time::Duration};

use derive_new::new;
use thiserror::Error;

use super::LocalCommunicator;
use crate::{burn_compat::panic_message, comm::Communicator};

/// How to start local ranks.
#[derive(new, Debug, Clone)]
pub struct LaunchConfig {
    /// World size `N`.
    pub ranks: usize,
    /// How long a collective waits for its peers.
    #[new(value = "Duration::from_secs(30)")]
    pub timeout: Duration,
    /// Stack size of a rank's thread in bytes.
    #[new(value = "16 << 20")]
    pub stack_size: usize,
}

impl LaunchConfig {
    /// Sets how long a collective waits for its peers (30 s by default); [`Duration::MAX`] is for ever.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the stack size of a rank's thread in bytes (16 MiB by default).
    pub fn with_stack_size(mut self, stack_size: usize) -> Self {
        self.stack_size = stack_size;
        self
    }
}

/// How a rank ended without a result.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RankError<E> {
    /// The rank's function returned an error.
    #[error("rank {rank}: {error}")]
    Failed {
        /// The rank.
        rank: usize,
        /// Its error.
        error: E,
    },
    /// The rank panicked.
    #[error("rank {rank} panicked: {message}")]
    Panicked {
        /// The rank.
        rank: usize,
        /// The panic message.
        message: String,
    },
    /// The rank's thread could not be started.
    #[error("rank {rank} could not be started: {message}")]
    NotStarted {
        /// The rank.
        rank: usize,
        /// What the operating system said.
        message: String,
    },
}

/// Runs `program` as `N` ranks, each in a thread of its own, and returns their results in rank order.
///
/// A rank that returns an error or panics ends the group: every other rank's current or next collective returns an
/// error that names it. A rank that returns has left the group: peers that still wait for it get such an error too.
///
/// ```
/// use burn_fsep::comm::{ReduceBuffer, ReduceOp, Operation, local::{LaunchConfig, launch}};
///
/// let sums = launch(&LaunchConfig::new(4), |comm| {
///     let mut x = [comm.rank() as f32];
///     comm.all_reduce(Operation::new("sum of ranks"), ReduceBuffer::F32(&mut x), ReduceOp::Sum)?;
///     Ok::<_, burn_fsep::comm::CommError>(x[0])
/// });
/// assert!(sums.into_iter().all(|sum| sum.unwrap() == 6.0));
/// ```
///
/// # Panics
///
/// If [`LaunchConfig::ranks`] is 0.
pub fn launch<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    let ranks = LocalCommunicator::group(config.ranks, config.timeout);
    let program = &program;
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .enumerate()
            .map(|(rank, comm)| {
                std::thread::Builder::new()
                    .name(format!("rank-{rank}"))
                    .stack_size(config.stack_size)
                    .spawn_scoped(scope, move || run_rank(rank, Arc::new(comm), program))
            })
            .collect();
        let join = |(rank, thread): (usize, std::io::Result<std::thread::ScopedJoinHandle<'_, _>>)| match thread {
            Ok(thread) => thread.join().expect("a rank's panic is caught in its thread"),
            Err(error) => Err(RankError::NotStarted { rank, message: error.to_string() }),
        };
        threads.into_iter().enumerate().map(join).collect()
    })
}

fn run_rank<T, E: fmt::Display>(
    rank: usize,
    comm: Arc<LocalCommunicator>,
    program: &(impl Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync),
) -> Result<T, RankError<E>> {
    match comm.run(program) {
        Ok(result) => result.map_err(|error| RankError::Failed { rank, error }),
        Err(panic) => Err(RankError::Panicked { rank, message: panic_message(panic.as_ref()) }),
    }
}
