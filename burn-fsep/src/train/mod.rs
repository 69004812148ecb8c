//! Training: one object that makes whole steps ([`Trainer`]), and the parts that it is made of. Needs nothing of burn-train.

mod accumulation;
mod adamw;
mod at_path;
mod broadcast;
mod buckets;
mod callback;
mod clip;
mod collector;
#[cfg(feature = "dataset")]
mod data;
mod expert_bias;
mod gradients;
mod group_records;
mod optimizer;
mod optimizer_checks;
mod params;
mod planner_callback;
mod planner_config;
mod planner_report;
mod reduction;
mod replicas;
mod sharded_optimizer;
mod sync;
mod tokens;
mod trainer;
mod trainer_config;
mod whole_matrix;

pub use accumulation::Accumulation;
pub use adamw::{FusedAdamW, FusedAdamWConfig, FusedAdamWState};
pub use broadcast::broadcast_parameters;
pub use buckets::{GradientBuckets, GradientBucketsConfig};
pub use callback::{OptimizerContext, StepContext, TrainingCallback};
pub use clip::clip_grad_norm;
#[cfg(feature = "dataset")]
pub use data::RankDataset;
#[cfg(feature = "learner")]
pub(crate) use expert_bias::has_expert_biases;
pub use expert_bias::update_expert_biases;
#[cfg(feature = "learner")]
pub(crate) use gradients::GradientStep;
#[cfg(feature = "learner")]
pub(crate) use group_records::{gather_records, records_of_group};
pub use optimizer::TrainOptimizer;
pub use planner_callback::PlannerCallback;
pub use planner_config::PlannerConfig;
pub use planner_report::PlannerReport;
pub use replicas::check_replicas;
pub use sharded_optimizer::ShardedOptimizer;
pub use sync::sync_gradients;
pub use tokens::{token_mean, try_token_mean};
pub use trainer::{Trainer, TrainerStep};
pub use trainer_config::TrainerConfig;
pub use whole_matrix::WholeMatrixOptimizer;
