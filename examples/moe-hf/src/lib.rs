//! Mixture-of-Experts models of the Hugging Face hub (Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE), run and fine-tuned by several ranks.

// Burn's LibTorch backend: see burn-fsep/src/lib.rs
#![cfg_attr(feature = "libtorch", allow(deprecated))]

pub mod model;
