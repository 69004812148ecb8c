use burn_fsep::{
    comm::{Operation, all_gather_u64},
    launch::Rank,
    planner::memory::RankMemory,
};
use rank_args::RankArgs;

use super::{JobSizes, advice::misfit, available::Place, gib};
use crate::{MemoryArgs, MoeHfError, model::DecoderConfig};

/// What was estimated before a job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Estimated {
    /// Of a rank.
    pub memory: RankMemory,
    /// Ranks whose memory [`PeakMemory`](super::PeakMemory) measures together.
    measured: usize,
}

impl Estimated {
    /// What [`PeakMemory`](super::PeakMemory) measures, without what a process or a GPU's context takes by itself, in GiB.
    pub fn peak_gib(&self) -> f64 {
        gib(self.memory.peak().bytes) * self.measured as f64
    }
}

/// Estimates a job's memory, before any is taken. Collective: all ranks go on, or none. `is_thread`: all ranks are threads of this
/// process.
///
/// # Errors
///
/// [`MoeHfError::DoesNotFit`] if it is more than the rank with least has, [`MoeHfError::Option`] for sizes that make no sense.
pub(crate) fn check(
    job: &JobSizes,
    decoder: &DecoderConfig,
    rank: &Rank,
    (args, options): (&RankArgs, MemoryArgs),
    is_thread: bool,
) -> Result<Estimated, MoeHfError> {
    let memory = job.memory(decoder)?;
    let place = Place::of(rank, args, is_thread);
    // Also a barrier: no rank takes memory before all have looked.
    let limits =
        all_gather_u64(rank.comm.as_ref(), Operation::new("free memory"), &[place.limit().unwrap_or(u64::MAX)])?;
    let least = limits.into_iter().min().unwrap_or(u64::MAX);
    match misfit(job, decoder, &memory, least) {
        Some(error) if !options.ignore_memory_estimate => Err(error),
        _ => Ok(Estimated { memory, measured: place.measured }),
    }
}
