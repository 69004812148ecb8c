//! Optimizer state that is cut over ranks (ZeRO-1).

mod optimizer;
mod parts;
mod probe;

pub use optimizer::ShardedOptimizer;
pub(super) use optimizer::check_experts;
