//! Trains a byte-level Mixture-of-Experts language model with burn-fsep: `cargo run --release -p moe-lm`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = moe_lm::Args::parse();
    match moe_lm::run(&args) {
        Ok(_) => ExitCode::SUCCESS,
        Err(moe_lm::MoeLmError::ReportedByFirst(_)) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
