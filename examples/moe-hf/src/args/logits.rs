use std::path::PathBuf;

use clap::Args;

use super::ParallelArgs;

/// Options of `logits`.
#[derive(Args, Debug, Clone)]
pub struct LogitsArgs {
    /// The model's folder.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Token ids, as JSON: `[[token, ...], ...]`. Rows may differ in length.
    #[arg(long, value_name = "FILE")]
    pub ids: PathBuf,
    /// File for `{"logits": [[[...]]]}`: for each row and token those of the next one, in single precision.
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Where it is done.
    #[command(flatten)]
    pub parallel: ParallelArgs,
}
