use std::fmt;

use super::{MemoryError, MemoryModel, RankMemory, RankSplit, Recompute, TrainingSizes};

/// A change of a job that takes less memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryChange {
    /// Groups of so many ranks share the experts.
    Groups(u64),
    /// Optimizer state is cut.
    Zero,
    /// More micro-batches of fewer tokens.
    MicroBatches(u64),
    /// More is computed again.
    Recompute(Recompute),
    /// All of these: the optimizer state is cut, layers are computed again, and groups are as large as they can be.
    Everything,
}

impl fmt::Display for MemoryChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Groups(ranks) => write!(f, "groups of {ranks} ranks (--groups {ranks})"),
            Self::Zero => f.write_str("optimizer state cut over ranks (--zero)"),
            Self::MicroBatches(count) => write!(f, "{count} micro-batches of fewer tokens"),
            Self::Recompute(Recompute::Layers) => f.write_str("layers computed again in backward"),
            Self::Recompute(_) => f.write_str("the experts' first projection computed again in backward"),
            Self::Everything => f.write_str("the largest groups, --zero and layers computed again together"),
        }
    }
}

/// The single changes that bring a job below `limit_bytes`, and their peaks, in bytes; all of them together where no single one does.
/// Empty if nothing helps: the job needs more ranks, or GPUs with more memory.
///
/// # Errors
///
/// As [`RankMemory::of`] of the job as it is.
pub fn changes_that_fit(
    model: &MemoryModel,
    training: &TrainingSizes,
    split: RankSplit,
    limit_bytes: u64,
) -> Result<Vec<(MemoryChange, u64)>, MemoryError> {
    RankMemory::of(model, training, split)?;
    let mut found = Vec::new();
    let mut try_one = |change, training: &TrainingSizes, split| {
        // What a change makes senseless is none.
        let peak = RankMemory::of(model, training, split).map(|memory| memory.peak().bytes);
        let fits = peak.as_ref().is_ok_and(|&bytes| bytes <= limit_bytes);
        found.extend(peak.ok().filter(|_| fits).map(|bytes| (change, bytes)));
        fits
    };
    let larger = (split.group_ranks + 1..=split.world_size).filter(|ranks| split.world_size.is_multiple_of(*ranks));
    let _ = larger
        .into_iter()
        .any(|ranks| try_one(MemoryChange::Groups(ranks), training, RankSplit { group_ranks: ranks, ..split }));
    if !split.zero {
        try_one(MemoryChange::Zero, training, RankSplit { zero: true, ..split });
    }
    let all_tokens = training.tokens * training.micro_batches;
    let more = (1..=6).map(|i| training.micro_batches << i).filter(|count| all_tokens.is_multiple_of(*count));
    let _ = more.into_iter().any(|micro_batches| {
        let tokens = all_tokens / micro_batches;
        try_one(MemoryChange::MicroBatches(micro_batches), &TrainingSizes { tokens, micro_batches, ..*training }, split)
    });
    let _ = [Recompute::Experts, Recompute::Layers]
        .into_iter()
        .filter(|&recompute| recompute > training.recompute)
        .any(|recompute| try_one(MemoryChange::Recompute(recompute), &TrainingSizes { recompute, ..*training }, split));
    if found.is_empty() {
        let everything = RankSplit { group_ranks: split.world_size, zero: true, ..split };
        let training = TrainingSizes { recompute: Recompute::Layers, ..*training };
        let peak = RankMemory::of(model, &training, everything)?.peak().bytes;
        found.extend((peak <= limit_bytes).then_some((MemoryChange::Everything, peak)));
    }
    Ok(found)
}
