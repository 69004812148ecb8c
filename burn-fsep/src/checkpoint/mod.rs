//! Checkpoints of sharded training: each rank saves its own part, and any number of ranks can go on from there.
//!
//! A checkpoint is a folder on a file system that all ranks share:
//!
//! | file | content |
//! | --- | --- |
//! | `experts-RANK-of-N.safetensors` | a rank's part of the experts of all layers, and its optimizer state |
//! | `replicated.safetensors` | everything else, equal on all ranks, and rank 0's running statistics; scalars of the optimizer; the user's records |
//! | `manifest.json` | sizes, types, layouts, progress; size and SHA-256 of each file |
//! | `manifest.sha256` | SHA-256 of the manifest, as `sha256sum` writes it |
//!
//! It is written under another name and renamed when every file is on disk, so it exists whole or not at all. Loading
//! compares every file with its checksum before anything is changed.
//!
//! - [`CheckpointConfig`] and [`Checkpoints`]: the checkpoints of a folder, of which the last ones are kept;
//! - [`save`], [`load`], [`list`], [`verify`]: one checkpoint;
//! - [`export_unsharded`], [`import_unsharded`]: whole experts in one file, for the dense model and for others.

mod all_or_none;
mod config;
mod content;
mod error;
mod folder;
mod load;
mod manifest;
mod model;
mod optimizer;
mod output;
mod parts;
mod progress;
mod reshard;
mod save;
mod snapshot;
mod tensors;
#[cfg(all(test, feature = "flex"))]
mod tests;
mod unsharded;
mod whole_experts;

pub(crate) use all_or_none::{SharedError, Work, all_or_none, gather};
pub use config::CheckpointConfig;
pub use error::CheckpointError;
pub use load::{CheckpointInfo, Loaded, list, load, verify};
pub use optimizer::{CheckpointedOptimizer, HeldState};
pub use progress::TrainingProgress;
pub(crate) use reshard::Sharding;
pub use save::{Checkpoints, save};
pub use unsharded::{export_unsharded, import_unsharded};
