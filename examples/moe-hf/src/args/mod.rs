//! Commands and their options, and whether they can work.

mod bench;
mod command;
mod finetune;
mod generate;
mod logits;
mod make;
mod parallel;

pub use bench::BenchArgs;
pub(crate) use command::check_positive;
pub use command::{Cli, Command, InspectArgs};
pub use finetune::{FinetuneArgs, OptimizerArgs};
pub use generate::GenerateArgs;
pub use logits::LogitsArgs;
pub use make::{MakeArgs, MakeFamily};
pub use parallel::{Dtype, ParallelArgs};
