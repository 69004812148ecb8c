use super::{Cli, CliError, Command, benchmark, calibrate, memory, plan, replay, report, scale, simulate};

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
        Command::Memory(args) => memory::table(args),
        Command::Simulate(args) => simulate::table(args),
        Command::Scale(args) => scale::table(args),
        Command::Benchmark(args) => benchmark::table(args),
        Command::Calibrate(args) => calibrate::calibrate(args),
    }
}
