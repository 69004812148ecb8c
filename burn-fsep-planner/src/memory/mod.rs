//! What a rank's memory has to hold while it trains, told before the job starts: `docs/memory.md` has the formulae and what was measured.
//!
//! Pure functions of sizes: no GPU, no model, no I/O.
//!
//! ```
//! use burn_fsep_planner::memory::{ActivationSizes, MemoryModel, MoeSizes, RankMemory, RankSplit, TrainingSizes};
//!
//! // OLMoE-1B-7B, all bf16, on one GPU.
//! let moe = MoeSizes { layers: 16, experts: 64, expert_parameters: 3 * 2048 * 1024, hidden_size: 2048,
//!     intermediate_size: 1024, gated: true, topk: 8, slots_per_rank: 64 };
//! let activations = ActivationSizes { layers: 16, elements_per_token: 12 * 2048, f32_elements_per_token: 16,
//!     vocabulary: 50304 };
//! let model = MemoryModel { replicated_parameters: 476_585_984, moe, activations };
//! let training = TrainingSizes { tokens: 8192, ..TrainingSizes::bf16() };
//! let memory = RankMemory::of(&model, &training, RankSplit::single())?;
//! assert!(memory.peak().bytes > 60 << 30);
//! # Ok::<_, burn_fsep_planner::memory::MemoryError>(())
//! ```

mod advice;
mod error;
mod peak;
mod rank_memory;
mod sizes;
#[cfg(test)]
mod tests;

pub use advice::{MemoryChange, changes_that_fit};
pub use error::MemoryError;
pub use peak::{Peak, Phase};
pub use rank_memory::{Activations, ByPlacement, RankMemory};
pub use sizes::{ActivationSizes, MemoryModel, MoeSizes, OptimizerState, RankSplit, Recompute, TrainingSizes};
