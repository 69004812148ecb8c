//! The options that the examples share: how many ranks there are, what they compute on and how they exchange.

#![allow(deprecated)] // Burn's LibTorch backend: see burn-fsep/src/lib.rs

mod backend;
mod comm;
mod device;
mod rank_args;

pub use backend::Backend;
pub use comm::Comm;
pub use device::DeviceArg;
pub use rank_args::RankArgs;
