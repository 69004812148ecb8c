//! Commands and their options, and whether they can work.

mod bench;
mod command;
mod finetune;
mod generate;
mod inspect;
mod logits;
mod make;
mod memory;
mod parallel;

pub use bench::BenchArgs;
pub use command::{Cli, Command};
pub use finetune::{FinetuneArgs, OptimizerArgs};
pub use generate::GenerateArgs;
pub use inspect::InspectArgs;
pub use logits::LogitsArgs;
pub use make::{MakeArgs, MakeFamily};
pub use memory::MemoryArgs;
pub use parallel::{Dtype, ParallelArgs};
