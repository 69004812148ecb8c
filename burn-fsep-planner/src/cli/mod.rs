//! The command `fsep-planner`: evaluates planners without GPUs and without Burn.

mod args;
mod error;
mod files;
mod plan;
mod replay;
mod report;
mod summary;

pub use args::{Cli, Command, PlanArgs, ReplayArgs, ReportArgs, TraceArgs};
pub use error::CliError;

/// Runs a command and returns what it prints.
///
/// # Errors
///
/// [`CliError`] naming the file and what is wrong with it.
pub fn run(cli: &Cli) -> Result<String, CliError> {
    match &cli.command {
        Command::Plan(args) => plan::plan(args),
        Command::Replay(args) => replay::table(args),
        Command::Report(args) => report::report(args),
    }
}
