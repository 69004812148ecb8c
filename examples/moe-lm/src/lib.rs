//! A byte-level decoder-only transformer whose feed-forward layers are [`burn_fsep::FSEPMoE`], trained through
//! burn-train's Learner by several ranks.

mod args;
mod corpus;
mod data;
mod error;
mod generate;
mod model;
mod page;
mod record;
mod resume;
mod run;
mod train;

pub use args::{Args, Planner};
pub use corpus::{Corpus, unigram_entropy};
pub use error::MoeLmError;
pub use record::Summary;
pub use run::run;
