//! Simulator of whole training steps: what a model, a cluster and a load balance add up to in seconds, without GPUs.
//!
//! A step is micro-batches, each of them layers forward and backward. Per layer it counts attention, the experts of the
//! most loaded rank, four token All-to-Alls on their busiest port (six with recomputation), and what prefetching cannot
//! hide of restoring expert weights and resharding their gradients. See `docs/simulator.md` for the equations.

mod architecture;
pub mod calibration;
mod cluster;
mod communication;
mod error;
mod groups;
mod load;
pub mod measure;
mod model;
mod model_sizes;
mod scale;
mod schedule;
mod step;
mod step_time;
mod strategies;
mod synthetic;
mod token_rows;
mod training;

pub use architecture::{ArchitectureSpec, AttentionSpec};
pub use cluster::{ClusterSpec, MeasuredConstants};
pub use error::SimulatorError;
pub use groups::GroupSpec;
pub use load::LayerLoad;
pub use model::{ModelSpec, WeightPlacement};
pub use scale::{ScalePoint, ScaleRun};
pub use step::Simulator;
pub use step_time::StepTime;
pub use strategies::{Outcome, TraceRun};
pub use synthetic::SyntheticRouting;
pub use token_rows::expected_ranks;
pub use training::{DenseParameters, TokenRowsSpec, TrainingSpec};
