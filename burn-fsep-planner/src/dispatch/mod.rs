//! Dispatch: which replica of an expert computes which tokens, from exact counts.

mod dispatcher;
mod even;
mod even_over_all;
mod flow;
mod min_cost;
mod min_max;
mod plan;
mod replica_choice;
mod token_rows;

pub use dispatcher::Dispatcher;
pub use even::EvenSplit;
pub(crate) use even_over_all::EvenOverAll;
pub(crate) use flow::Flow;
pub use min_max::MinMax;
pub use plan::{DispatchPlan, Share, max_over_mean};
pub use replica_choice::ReplicaChoice;
pub use token_rows::TokenRowBounds;
