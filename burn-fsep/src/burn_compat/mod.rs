//! What this crate relies on and Burn does not promise: one file a thing, which says what is relied on, with contract tests
//! that fail if Burn changes it. The list, with the place in Burn's source, is docs/burn-compat.md.
//!
//! The bottom room: nothing here knows anything of FSEP. Before Burn is upgraded, `scripts/try_burn.py` runs these tests with
//! the new version.

mod backward_order;
mod forked_graphs;
mod lazy_params;
mod leaf_gradient;
#[cfg(feature = "learner")]
mod learner_records;
mod metadata;
mod module_path;
mod optimizer_parts;
mod optimizer_state;
mod panics;
mod param_tag;
mod parameter_context;
mod reparameterization;
mod reshape;
mod running_statistics;
#[cfg(all(test, feature = "flex"))]
mod test_op;

#[cfg(feature = "learner")]
pub(crate) use learner_records::learner_records;
pub(crate) use metadata::Metadata;
pub(crate) use module_path::ModulePath;
pub(crate) use optimizer_state::{ParamState, StateError, check_scalar, load_states, states_of};
pub(crate) use panics::{catch_panic, panic_message};
pub(crate) use param_tag::{param_tag, tagged_param};
pub(crate) use parameter_context::ParameterContext;
pub(crate) use reparameterization::is_reparameterized;
pub(crate) use reshape::reshape;
pub(crate) use running_statistics::has_running_statistics;
