use std::collections::HashSet;

use burn::{module::Module, optim::OptimizerRecord};

use super::{
    CheckpointError, HeldState,
    all_or_none::all_or_none,
    model::{ModelParam, model_values},
    tensors::HostTensor,
    whole_experts::{States, states_of_shards},
};
use crate::{
    FsepRuntime,
    burn_compat::{ParamState, states_of},
    comm::Operation,
    shard::FlatParts,
};

const SNAPSHOT: Operation = Operation::new("state of a checkpoint");

/// A parameter with what goes into files of it.
pub(super) struct SavedParam {
    pub param: ModelParam,
    pub value: HostTensor,
    pub state: ParamState<HostTensor>,
    /// Which part of the state's tensors this is; `None` if they are whole.
    pub parts: Option<FlatParts>,
}

/// What a rank has to save of a model and its optimizer, in host memory; in the model's order. Collective if ranks step whole experts.
///
/// # Errors
///
/// [`CheckpointError::Unsupported`] for what cannot be saved.
pub(super) fn snapshot<M: Module>(
    runtime: &FsepRuntime,
    model: &M,
    optimizer: OptimizerRecord,
    held: HeldState,
) -> Result<Vec<SavedParam>, CheckpointError> {
    let unsupported = |what: &str, reason: String| CheckpointError::Unsupported { what: what.into(), reason };
    let local = model_values(runtime, model).and_then(|params| Ok((params, host_states(optimizer)?)));
    let (params, mut states) = match held {
        HeldState::OwnExperts => {
            let (params, states) = all_or_none(runtime.comm(), SNAPSHOT, local)?;
            let states = states_of_shards(runtime, params.iter().map(|(param, _)| param), states)?;
            (params, states)
        }
        HeldState::Whole | HeldState::OwnPart => local?,
    };
    let mut saved = Vec::with_capacity(params.len());
    let mut seen = HashSet::new();
    for (param, value) in params {
        // A parameter that stands in two places of a model has one state.
        let state = if seen.insert(param.id) { states.remove(&param.id.val()) } else { None };
        let state = state.unwrap_or_default();
        let parts = param.state_parts(runtime, held).map(|(parts, _)| parts);
        if param.experts.is_some()
            && parts.is_none()
            && let Some((field, state)) = state.tensors.iter().find(|(_, state)| state.shape != value.shape)
        {
            let reason = format!(
                "the optimizer's `{field}` has the shape {:?}, but experts of the shape {:?} need optimizers that work \
                 element by element (SGD, Adam, AdamW)",
                state.shape, value.shape
            );
            return Err(unsupported(&param.path, reason));
        }
        check_parts(runtime, &param, parts, &state).map_err(|reason| unsupported(&param.path, reason))?;
        saved.push(SavedParam { param, value, state, parts });
    }
    match states.keys().next() {
        None => Ok(saved),
        Some(id) => Err(unsupported(
            &format!("optimizer state {id}"),
            "the model has no parameter of this id: save the model that this optimizer trains".into(),
        )),
    }
}

/// An optimizer's states in host memory.
fn host_states(optimizer: OptimizerRecord) -> Result<States, CheckpointError> {
    let unsupported = |reason| CheckpointError::Unsupported { what: "optimizer".into(), reason };
    let states = states_of(optimizer).map_err(unsupported)?;
    states.into_iter().map(|(id, state)| Ok((id, state.try_map(HostTensor::new)?))).collect()
}

/// Checks that a state is what its optimizer says that it holds: the part, or the whole.
fn check_parts(
    runtime: &FsepRuntime,
    param: &ModelParam,
    parts: Option<FlatParts>,
    state: &ParamState<HostTensor>,
) -> Result<(), String> {
    let part_shape = |parts: FlatParts| parts.part_shape(param.value_shape.len());
    if let Some(expected) = parts.map(part_shape) {
        return match state.tensors.iter().find(|(_, tensor)| tensor.shape != expected) {
            None => Ok(()),
            Some((field, tensor)) => Err(format!(
                "the optimizer's `{field}` has the shape {:?}, but a rank's part {expected:?}",
                tensor.shape
            )),
        };
    }
    // An optimizer of Burn's that a sharded one was made of: of its state every rank has another part.
    let cut = param.state_parts(runtime, HeldState::OwnPart).map(|(parts, _)| part_shape(parts));
    match cut {
        Some(cut) if !state.tensors.is_empty() && state.tensors.values().all(|tensor| tensor.shape == cut) => {
            Err("the optimizer has this rank's part of its state alone: save the `ShardedOptimizer` that it is of"
                .into())
        }
        _ => Ok(()),
    }
}
