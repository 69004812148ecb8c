//! Sharding: experts are flattened, padded and cut into `N` equal shards; layers unshard whole experts
//! before they compute and return gradients to the shards (reshard).

mod expert;
mod gauge;
mod owner;
mod plan;

pub(crate) use expert::mix;
pub use expert::{ExpertShape, expert_parameters};
pub use gauge::{UnshardedGauge, UnshardedGuard};
#[cfg(feature = "train")]
pub(crate) use owner::is_shard_of;
pub(crate) use owner::{foreign_owner, shard_id};
pub(crate) use plan::{RepairPlan, UnshardPlan, sum_replicas};
