//! Training: what has to happen between backward and the optimizer, by hand or in burn-train's Learner.

mod checkpoints;
mod clip;
mod data;
mod metrics;
mod params;
mod renderer;
mod strategy;
mod sync;

pub use clip::clip_grad_norm;
pub use data::RankDataset;
pub use metrics::{FsepStats, ImbalanceMetric, LayerImbalanceMetric, MovedSlotsMetric, StaticImbalanceMetric};
pub use renderer::SilentRenderer;
pub use strategy::FsepStrategy;
pub use sync::{broadcast_parameters, sync_gradients};
