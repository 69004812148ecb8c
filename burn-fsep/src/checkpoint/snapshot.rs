use std::collections::HashSet;

use burn::{module::Module, optim::OptimizerRecord};

use super::{
    CheckpointError,
    model::{ModelParam, model_values},
    tensors::HostTensor,
};
use crate::{
    FsepRuntime,
    burn_compat::{ParamState, states_of},
};

/// A parameter with what goes into files of it.
pub(super) struct SavedParam {
    pub param: ModelParam,
    pub value: HostTensor,
    pub state: ParamState<HostTensor>,
}

/// What a rank has to save of a model and its optimizer, in host memory; in the model's order.
///
/// # Errors
///
/// [`CheckpointError::Unsupported`] for what cannot be saved.
pub(super) fn snapshot<M: Module>(
    runtime: &FsepRuntime,
    model: &M,
    optimizer: OptimizerRecord,
) -> Result<Vec<SavedParam>, CheckpointError> {
    let unsupported = |what: &str, reason: String| CheckpointError::Unsupported { what: what.into(), reason };
    let params = model_values(runtime, model)?;
    let mut states = states_of(optimizer).map_err(|reason| unsupported("optimizer", reason))?;
    let mut saved = Vec::with_capacity(params.len());
    let mut seen = HashSet::new();
    for (param, value) in params {
        // A parameter that stands in two places of a model has one state.
        let state = if seen.insert(param.id) { states.remove(&param.id.val()) } else { None };
        let state = state.unwrap_or_default().try_map(HostTensor::new)?;
        if param.experts.is_some()
            && let Some((field, state)) = state.tensors.iter().find(|(_, state)| state.shape != value.shape)
        {
            let reason = format!(
                "the optimizer's `{field}` has the shape {:?}, but experts of the shape {:?} need optimizers that work \
                 element by element (SGD, Adam, AdamW)",
                state.shape, value.shape
            );
            return Err(unsupported(&param.path, reason));
        }
        saved.push(SavedParam { param, value, state });
    }
    match states.keys().next() {
        None => Ok(saved),
        Some(id) => Err(unsupported(
            &format!("optimizer state {id}"),
            "the model has no parameter of this id: save the model that this optimizer trains".into(),
        )),
    }
}
