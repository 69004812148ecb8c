//! Burn's records: what they hold, and new ones of the same. Optimizer state is only to be had in them, keyed by the
//! parameters' ids, which every process draws anew; so it is matched by the parameters' paths.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    panic::{AssertUnwindSafe, catch_unwind},
};

use burn::{
    module::Module,
    optim::{ModuleOptimizer, OptimizerRecord},
    store::{ModuleRecord, RecordError},
    tensor::Bytes,
};
use burn_pack::{Reader, Scalar, Tensor, Writer};
use safetensors::Dtype;

use super::{
    CheckpointError,
    model::ModelParam,
    tensors::{HostTensor, burn_dtype, file_dtype},
};

/// A parameter's optimizer state, by field.
#[derive(Clone, Default)]
pub(super) struct ParamState {
    pub tensors: BTreeMap<String, HostTensor>,
    pub scalars: BTreeMap<String, Scalar>,
}

/// What a rank has to save, in host memory; in the model's order.
pub(super) struct Snapshot {
    pub params: Vec<(ModelParam, HostTensor, ParamState)>,
}

impl Snapshot {
    /// Takes records apart.
    pub fn new(
        params: Vec<ModelParam>,
        model: ModuleRecord,
        optimizer: OptimizerRecord,
    ) -> Result<Self, CheckpointError> {
        let mut values = HashMap::new();
        for tensor in read(model.into_bytes())?.into_tensors().map_err(burnpack)? {
            let (name, tensor) = host_tensor(tensor)?;
            values.insert(name, tensor);
        }
        let mut states = states(optimizer)?;
        let mut all = Vec::with_capacity(params.len());
        let mut seen = HashSet::new();
        for param in params {
            let value = values.remove(&param.path).ok_or_else(|| unsupported(&param.path, "its record lacks it"))?;
            // A parameter that stands in two places of a model has one state.
            let state = if seen.insert(param.id) {
                states.remove(&param.id.val()).unwrap_or_default()
            } else {
                ParamState::default()
            };
            if param.experts.is_some()
                && let Some((field, state)) = state.tensors.iter().find(|(_, state)| state.shape != value.shape)
            {
                let reason = format!(
                    "the optimizer's `{field}` has the shape {:?}, but experts of the shape {:?} need optimizers that \
                     work element by element (SGD, Adam, AdamW)",
                    state.shape, value.shape
                );
                return Err(unsupported(&param.path, reason));
            }
            all.push((param, value, state));
        }
        if let Some(id) = states.keys().next() {
            return Err(unsupported(
                &format!("optimizer state {id}"),
                "the model has no parameter of this id: save the model that this optimizer trains",
            ));
        }
        Ok(Self { params: all })
    }
}

/// What the optimizer keeps of each parameter, by id.
fn states(record: OptimizerRecord) -> Result<BTreeMap<u64, ParamState>, CheckpointError> {
    let reader = read(record.into_bytes())?;
    let mut states: BTreeMap<u64, ParamState> = BTreeMap::new();
    for (name, &scalar) in reader.scalars() {
        let (id, field) = split(name)?;
        states.entry(id).or_default().scalars.insert(field, scalar);
    }
    for tensor in reader.into_tensors().map_err(burnpack)? {
        let (name, tensor) = host_tensor(tensor)?;
        let (id, field) = split(&name)?;
        states.entry(id).or_default().tensors.insert(field, tensor);
    }
    Ok(states)
}

/// `"42.momentum.time"` is the field `momentum.time` of parameter 42.
fn split(name: &str) -> Result<(u64, String), CheckpointError> {
    let parts = name.split_once('.').and_then(|(id, field)| Some((id.parse().ok()?, field.to_string())));
    parts.ok_or_else(|| unsupported(name, "it is of no parameter"))
}

fn read(bytes: Result<Bytes, RecordError>) -> Result<Reader, CheckpointError> {
    let bytes = bytes.map_err(|error| unsupported("record", error.to_string()))?;
    Reader::from_bytes(bytes).map_err(burnpack)
}

fn host_tensor(tensor: Tensor) -> Result<(String, HostTensor), CheckpointError> {
    let (name, dtype, shape, _, bytes) = tensor.into_parts().map_err(burnpack)?;
    match file_dtype(dtype) {
        Some(dtype) => Ok((name, HostTensor { dtype, shape: shape.to_vec(), bytes })),
        None => Err(unsupported(&name, format!("tensor files have no type {dtype:?}"))),
    }
}

/// The model with these values, in the model's order.
pub(super) fn load_model<M: Module>(
    model: &M,
    params: &[ModelParam],
    values: Vec<HostTensor>,
) -> Result<M, CheckpointError> {
    let tensors = params.iter().zip(values).map(|(param, value)| pack(param.path.clone(), param.id.val(), value));
    let writer = Writer::new(tensors.collect::<Result<_, _>>()?);
    let record = writer.into_bytes().map_err(burnpack)?;
    let record = ModuleRecord::from_bytes(record).map_err(|error| unsupported("model", error.to_string()))?;
    model.clone().try_load_record(record).map_err(|error| unsupported("model", error.to_string()))
}

/// The optimizer with these states of parameters, in the model's order.
///
/// # Errors
///
/// The place of the parameter whose state the optimizer does not take, and why.
pub(super) fn load_optimizer(
    optimizer: &ModuleOptimizer,
    params: &[ModelParam],
    states: Vec<ParamState>,
) -> Result<ModuleOptimizer, OptimizerError> {
    // Burn leaves out states that it cannot make sense of, so first the same with tensors of one element, to see.
    let probes: Vec<_> = states.iter().map(probe).collect();
    let record = optimizer_record(params, probes.clone())?;
    // It panics on tensors whose number of dimensions is not the one that the optimizer's state has.
    let loaded = catch_unwind(AssertUnwindSafe(|| optimizer.clone().load_record(record)))
        .map_err(|_| unsupported("optimizer", "Burn cannot load its state; see the message above"))?;
    let mut found = self::states(loaded.to_record())?;
    for (place, (param, probe)) in params.iter().zip(&probes).enumerate() {
        if probe.tensors.is_empty() && probe.scalars.is_empty() {
            continue;
        }
        let refuse = |reason: String| OptimizerError::Refused { place, reason };
        let Some(found) = found.remove(&param.id.val()) else {
            return Err(refuse("is of another kind of optimizer".into()));
        };
        for (field, tensor) in &probe.tensors {
            match found.tensors.get(field) {
                None => return Err(refuse(format!("has a field `{field}` that this optimizer does not have"))),
                Some(other) if other.dtype != tensor.dtype => {
                    return Err(refuse(format!(
                        "is of type {}, but Burn loads it in the default type of `Device::default()`, {}: configure \
                         that device before it is used (`Device::configure`), or use an optimizer that keeps the type \
                         (`FusedAdamW`)",
                        tensor.dtype, other.dtype
                    )));
                }
                Some(_) => {}
            }
        }
        if let Some(field) = probe.scalars.keys().find(|field| !found.scalars.contains_key(*field)) {
            return Err(refuse(format!("has a field `{field}` that this optimizer does not have")));
        }
    }
    Ok(optimizer.clone().load_record(optimizer_record(params, states)?))
}

/// Why an optimizer's state was not loaded.
pub(super) enum OptimizerError {
    Refused { place: usize, reason: String },
    Other(CheckpointError),
}

impl From<CheckpointError> for OptimizerError {
    fn from(error: CheckpointError) -> Self {
        Self::Other(error)
    }
}

/// The same state with tensors of one element.
fn probe(state: &ParamState) -> ParamState {
    let small = |tensor: &HostTensor| HostTensor {
        dtype: tensor.dtype,
        shape: vec![1; tensor.shape.len()],
        bytes: Bytes::from_bytes_vec(vec![0; tensor.dtype.bitsize() / 8]),
    };
    let tensors = state.tensors.iter().map(|(field, tensor)| (field.clone(), small(tensor))).collect();
    ParamState { tensors, scalars: state.scalars.clone() }
}

fn optimizer_record(params: &[ModelParam], states: Vec<ParamState>) -> Result<OptimizerRecord, CheckpointError> {
    let mut tensors = Vec::new();
    let mut scalars = Vec::new();
    let mut paths = Vec::new();
    for (param, state) in params.iter().zip(states) {
        let id = param.id.val();
        if !state.scalars.is_empty() {
            paths.push((id.to_string(), param.path.clone()));
        }
        scalars.extend(state.scalars.into_iter().map(|(field, scalar)| (format!("{id}.{field}"), scalar)));
        for (field, tensor) in state.tensors {
            tensors.push(pack(format!("{id}.{field}"), id, tensor)?);
        }
    }
    let mut writer = Writer::new(tensors);
    for (name, scalar) in scalars {
        writer = writer.with_scalar(&name, scalar);
    }
    // Parameter groups of an optimizer may go by paths.
    for (id, path) in paths {
        writer = writer.with_metadata(&id, &path);
    }
    let bytes = writer.into_bytes().map_err(burnpack)?;
    OptimizerRecord::from_bytes(bytes).map_err(|error| unsupported("optimizer", error.to_string()))
}

fn pack(name: String, id: u64, tensor: HostTensor) -> Result<Tensor, CheckpointError> {
    let dtype =
        burn_dtype(tensor.dtype).ok_or_else(|| unsupported(&name, format!("Burn has no type {}", tensor.dtype)))?;
    Ok(Tensor::new(name, dtype, tensor.shape, Some(id), tensor.bytes))
}

/// The bytes of a scalar as a tensor of no dimensions has them.
pub(super) fn scalar_tensor(scalar: Scalar) -> HostTensor {
    let (dtype, bytes) = match scalar {
        Scalar::Int(value) => (Dtype::I64, value.to_le_bytes().to_vec()),
        Scalar::UInt(value) => (Dtype::U64, value.to_le_bytes().to_vec()),
        Scalar::Float(value) => (Dtype::F64, value.to_le_bytes().to_vec()),
        Scalar::Bool(value) => (Dtype::BOOL, vec![u8::from(value)]),
    };
    HostTensor { dtype, shape: Vec::new(), bytes: Bytes::from_bytes_vec(bytes) }
}

/// The inverse of [`scalar_tensor`].
pub(super) fn tensor_scalar(tensor: &HostTensor) -> Option<Scalar> {
    let word = || <[u8; 8]>::try_from(&tensor.bytes[..]).ok();
    match tensor.dtype {
        Dtype::I64 => word().map(|word| Scalar::Int(i64::from_le_bytes(word))),
        Dtype::U64 => word().map(|word| Scalar::UInt(u64::from_le_bytes(word))),
        Dtype::F64 => word().map(|word| Scalar::Float(f64::from_le_bytes(word))),
        Dtype::BOOL if tensor.bytes.len() == 1 => Some(Scalar::Bool(tensor.bytes[0] != 0)),
        _ => None,
    }
}

fn burnpack(error: burn_pack::Error) -> CheckpointError {
    unsupported("record", error.to_string())
}

fn unsupported(what: &str, reason: impl Into<String>) -> CheckpointError {
    CheckpointError::Unsupported { what: what.into(), reason: reason.into() }
}
