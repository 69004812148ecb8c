//! Options, and whether they can work.

mod command;
mod model;
mod output;
mod parallel;
mod training;

pub use command::Args;
pub use model::ModelArgs;
pub use output::OutputArgs;
pub use parallel::{ParallelArgs, Planner};
pub use training::TrainingArgs;
