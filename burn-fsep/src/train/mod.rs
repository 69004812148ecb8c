//! Training: what has to happen between backward and the optimizer, by hand or in burn-train's Learner.

mod adamw;
mod broadcast;
mod buckets;
mod burn_checkpoints;
mod callback;
mod clip;
mod collector;
mod data;
mod learner_checkpoints;
mod metrics;
mod params;
mod planner_callback;
mod planner_config;
mod planner_report;
mod reduction;
mod renderer;
mod strategy;
mod sync;

pub use adamw::{FusedAdamW, FusedAdamWConfig, FusedAdamWState};
pub use broadcast::broadcast_parameters;
pub use buckets::{GradientBuckets, GradientBucketsConfig};
pub use callback::{OptimizerContext, StepContext, TrainingCallback};
pub use clip::clip_grad_norm;
pub use data::RankDataset;
pub use metrics::{FsepStats, ImbalanceMetric, ImbalanceP95Metric, MovedSlotsMetric, StaticImbalanceMetric};
pub use planner_callback::PlannerCallback;
pub use planner_config::PlannerConfig;
pub use planner_report::PlannerReport;
pub use renderer::SilentRenderer;
pub use strategy::FsepStrategy;
pub use sync::sync_gradients;
