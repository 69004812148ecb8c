//! Sharding: experts are flattened, padded and cut into `N` equal shards; layers unshard whole experts
//! before they compute and return gradients to the shards (reshard).

mod expert;
mod flat;
mod gauge;
mod owner;
mod plan;
mod whole_experts;

pub use expert::{ExpertShape, expert_parameters};
pub(crate) use expert::{mix, uniform};
pub(crate) use flat::FlatParts;
pub use gauge::{UnshardedGauge, UnshardedGuard};
pub(crate) use owner::{foreign_owner, shard_id};
pub(crate) use plan::{RepairPlan, UnshardPlan, sum_replicas};
pub(crate) use whole_experts::{ExpertPart, WholeExperts, part_id};
