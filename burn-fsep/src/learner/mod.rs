//! Training through burn-train's Learner: its strategy, metrics of load balancing, and checkpoints of it.

mod checkpoints;
mod metrics;
mod optimizer;
mod renderer;
mod strategy;
mod strategy_optimizer;

pub use metrics::{
    FsepStats, ImbalanceMetric, ImbalanceP95Metric, MovedSlotsMetric, StaticImbalanceMetric, TokenBytesMetric,
};
pub use renderer::SilentRenderer;
pub use strategy::FsepStrategy;
pub use strategy_optimizer::StrategyOptimizer;
