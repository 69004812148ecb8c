//! A byte-level decoder-only transformer whose feed-forward layers are [`burn_fsep::FSEPMoE`], trained through
//! burn-train's Learner by several ranks.

// Burn's LibTorch backend: see burn-fsep/src/lib.rs
#![cfg_attr(feature = "libtorch", allow(deprecated))]

mod args;
mod corpus;
mod data;
mod error;
mod files;
mod generate;
mod model;
mod record;
mod resume;
mod run;
mod timeline;
mod train;

pub use args::{Args, ModelArgs, OutputArgs, ParallelArgs, Planner, TrainingArgs};
pub use corpus::{Corpus, unigram_entropy};
pub use error::MoeLmError;
pub use run::{JobEnd, run};
