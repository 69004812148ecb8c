//! Predictors: the routing counts of the step to come, from those of past steps.

mod adaptive;
mod base;
mod distance;
mod history;
mod last_step;
mod moving_average;
mod moving_sum;
mod recurring;

pub use adaptive::Adaptive;
pub use base::Predictor;
pub use last_step::LastStep;
pub use moving_average::MovingAverage;
pub use moving_sum::MovingSum;
pub use recurring::Recurring;
