//! Runs and fine-tunes Mixture-of-Experts models of the Hugging Face hub with burn-fsep: `cargo run --release -p moe-hf -- finetune`.

use std::process::ExitCode;

use clap::Parser;
use moe_hf::{Cli, MoeHfError, run};

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(MoeHfError::Run(error)) => error.report(),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
