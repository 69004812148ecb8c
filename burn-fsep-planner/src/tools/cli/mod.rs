//! The command `fsep-planner`: evaluates planners without GPUs and without Burn.

mod args;
mod benchmark;
mod calibrate;
mod error;
mod files;
mod memory;
mod plan;
mod replay;
mod report;
mod run;
mod scale;
mod scale_figure;
mod simulate;
mod specs;
mod summary;

pub use args::{
    BenchmarkArgs, CalibrateArgs, Cli, Command, MemoryArgs, PlanArgs, ReplayArgs, ReportArgs, ScaleArgs, SimulateArgs,
    SpecArgs, TraceArgs,
};
pub use error::CliError;
pub use run::run;
