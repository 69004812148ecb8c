//! Trains a byte-level Mixture-of-Experts language model with burn-fsep: `cargo run --release -p moe-lm`.

use std::process::ExitCode;

use clap::Parser;
use moe_lm::{Args, JobEnd, MoeLmError, run};

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(JobEnd::Finished) => ExitCode::SUCCESS,
        // As of a process that SIGTERM ended: whoever waits for the training sees that it is not done.
        Ok(JobEnd::Stopped) => ExitCode::from(128 + 15),
        Err(MoeLmError::Run(error)) => error.report(),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
