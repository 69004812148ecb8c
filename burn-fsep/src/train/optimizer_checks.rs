//! What optimizers that wrap one of Burn's check alike.

use std::hash::{DefaultHasher, Hash, Hasher};

use burn::optim::ModuleOptimizer;

use crate::{
    FsepError, FsepRuntime,
    burn_compat::states_of,
    comm::{Operation, agree},
};

/// Refuses an optimizer that has state, for one that keeps another state of the same parameters.
///
/// # Errors
///
/// [`FsepError::Config`] with this reason.
pub(super) fn refuse_state(optimizer: &ModuleOptimizer, reason: &str) -> Result<(), FsepError> {
    match states_of(optimizer.to_record()).map_err(FsepError::Config)?.is_empty() {
        true => Ok(()),
        false => Err(FsepError::Config(reason.into())),
    }
}

/// Compares what gradients a step has on all ranks, before anything is exchanged: a rank with fewer would leave the others waiting.
/// Collective.
///
/// # Errors
///
/// [`FsepError::Config`], on all ranks, that names the first rank that differs, and how: it has "gradients of ..".
pub(super) fn agree_on_gradients(
    runtime: &FsepRuntime,
    operation: Operation,
    facts: impl Hash,
    how: &str,
) -> Result<(), FsepError> {
    let mut hasher = DefaultHasher::new();
    facts.hash(&mut hasher);
    match agree(runtime.comm(), operation, &[("parameters", hasher.finish())])? {
        None => Ok(()),
        Some(difference) => Err(FsepError::Config(format!("rank {} has gradients of {how}", difference.rank))),
    }
}
