use std::sync::Arc;

use burn::{
    tensor::TensorReadError,
    train::metric::{
        Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
        SerializedEntry,
        state::{FormatOptions, NumericMetricState},
    },
};

use crate::StepStats;

/// Input of the load balancing metrics: what [`FsepRuntime::stats`](crate::FsepRuntime::stats) said of the step.
///
/// Put it into the output of your `TrainStep` and implement `Adaptor<FsepStats>` for that output.
#[derive(Debug, Clone, Default)]
pub struct FsepStats(pub StepStats);

/// Defines a metric that is one number of a step's statistics.
macro_rules! stats_metric {
    ($(#[$doc:meta])* $name:ident, $title:literal, $unit:expr, $value:expr) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name {
            name: MetricName,
            state: NumericMetricState,
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl $name {
            /// Creates the metric.
            pub fn new() -> Self {
                Self { name: Arc::new($title.to_string()), state: NumericMetricState::default() }
            }
        }

        impl Metric for $name {
            type Input = FsepStats;

            fn update(&mut self, item: &FsepStats, _: &MetricMetadata) -> Result<SerializedEntry, TensorReadError> {
                let value: fn(&StepStats) -> f64 = $value;
                self.state.update(value(&item.0), 1);
                Ok(self.state.compute_update(FormatOptions::new(self.name()).precision(3)))
            }

            fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
                Ok(self.state.compute_final(FormatOptions::new(self.name()).precision(3)))
            }

            fn clear(&mut self) {
                self.state.reset();
            }

            fn name(&self) -> MetricName {
                self.name.clone()
            }

            fn attributes(&self) -> MetricAttributes {
                NumericAttributes { unit: $unit, higher_is_better: false }.into()
            }
        }

        impl Numeric for $name {
            fn value(&self) -> Option<NumericEntry> {
                Some(self.state.current_value())
            }

            fn running_value(&self) -> Option<NumericEntry> {
                Some(self.state.running_value())
            }

            fn final_value(&self) -> NumericEntry {
                self.state.final_value()
            }
        }
    };
}

stats_metric!(
    /// Largest load of a rank over the mean load after balancing, mean over layers; 1 is perfect.
    ImbalanceMetric,
    "Expert imbalance",
    None,
    StepStats::imbalance
);
stats_metric!(
    /// The same before balancing: what static expert parallelism would have.
    StaticImbalanceMetric,
    "Expert imbalance (static EP)",
    None,
    StepStats::imbalance_static
);
stats_metric!(
    /// The 95th percentile over layers of the largest load of a rank over the mean load, after balancing.
    ImbalanceP95Metric,
    "Expert imbalance (p95 of layers)",
    None,
    |stats| stats.imbalance_percentile(95.0)
);
stats_metric!(
    /// Slots whose expert changed, over all layers.
    MovedSlotsMetric,
    "Moved slots",
    Some("slots".to_string()),
    |stats| stats.moved_slots() as f64
);
stats_metric!(
    /// Bytes of tokens to other ranks, as a share of what they would be if each token travelled once for each of its experts.
    TokenBytesMetric,
    "Token bytes (share)",
    None,
    StepStats::token_bytes_share
);
