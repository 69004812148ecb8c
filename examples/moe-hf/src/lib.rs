//! Mixture-of-Experts models of the Hugging Face hub (Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE), run and fine-tuned by several ranks.

// Burn's LibTorch backend: see burn-fsep/src/lib.rs
#![cfg_attr(feature = "libtorch", allow(deprecated))]

mod args;
mod batch;
mod bench;
mod corpus;
mod error;
mod files;
mod finetune;
mod folder;
mod generate;
mod inspect;
mod logits;
mod make;
mod memory;
pub mod model;
mod ranks;
mod run;
mod text;

pub use args::{
    BenchArgs, Cli, Command, Dtype, FinetuneArgs, GenerateArgs, InspectArgs, LogitsArgs, MakeArgs, MakeFamily,
    MemoryArgs, OptimizerArgs, ParallelArgs,
};
pub use batch::TokenBatch;
pub use corpus::Corpus;
pub use error::MoeHfError;
pub use folder::ModelFolder;
pub use inspect::ParameterCounts;
pub use run::run;
pub use text::TextCodec;
