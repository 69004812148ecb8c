//! Plans and replays from the command line: `cargo run --release -p burn-fsep-planner --features cli -- --help`.

use std::process::ExitCode;

use burn_fsep_planner::tools::cli::{Cli, run};
use clap::Parser;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
