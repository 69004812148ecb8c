use crate::{Command, MoeHfError, bench, finetune, generate, inspect, logits, make};

/// Does what the command says, or, as a process of a launcher, one rank's part of it.
///
/// # Errors
///
/// [`MoeHfError`] if an option cannot work, a file cannot be read or written, or the computation fails.
pub fn run(command: &Command) -> Result<(), MoeHfError> {
    match command {
        Command::Finetune(args) => finetune::finetune(args),
        Command::Generate(args) => generate::generate(args),
        Command::Logits(args) => logits::logits(args),
        Command::Inspect(args) => inspect::inspect(args),
        Command::Make(args) => make::make(args),
        Command::Bench(args) => bench::bench(args),
    }
}
