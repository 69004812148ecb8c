use clap::{Parser, Subcommand};

use super::{BenchArgs, FinetuneArgs, GenerateArgs, InspectArgs, LogitsArgs, MakeArgs};
use crate::MoeHfError;

/// Runs and fine-tunes Mixture-of-Experts models of the Hugging Face hub: Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE.
#[derive(Parser, Debug, Clone)]
#[command(version, about)]
pub struct Cli {
    /// What is done.
    #[command(subcommand)]
    pub command: Command,
}

/// What is done.
#[derive(Subcommand, Debug, Clone)]
pub enum Command {
    /// Fine-tunes a model on text and saves it in the hub's format; without any options a tiny one that it makes itself.
    Finetune(Box<FinetuneArgs>),
    /// Continues a text.
    Generate(GenerateArgs),
    /// Computes the logits of given token ids.
    Logits(LogitsArgs),
    /// Says what a model is: sizes, parameters, and the memory that training takes on each of N ranks; whether it fits.
    Inspect(Box<InspectArgs>),
    /// Makes a tiny model of bytes with random values.
    Make(MakeArgs),
    /// Measures training steps of a model with random values, and prints one line of JSON.
    Bench(BenchArgs),
}

/// The error of an option.
pub(crate) fn refuse<T>(message: String) -> Result<T, MoeHfError> {
    Err(MoeHfError::Option(message))
}

/// Numbers that have to be at least 1.
pub(crate) fn check_positive<const N: usize>(numbers: [(&str, usize); N]) -> Result<(), MoeHfError> {
    match numbers.into_iter().find(|(_, value)| *value == 0) {
        Some((name, _)) => refuse(format!("{name} must be at least 1")),
        None => Ok(()),
    }
}
