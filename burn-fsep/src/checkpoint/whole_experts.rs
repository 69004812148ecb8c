//! Optimizer state of experts that ranks step whole: files have it by shards, as they have the experts.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use burn::{
    module::ParamId,
    tensor::{Bytes, TensorData},
};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::{
    CheckpointError,
    all_or_none::{all_or_none, gather},
    manifest::to_json,
    model::ModelParam,
    reshard::Sharding,
    tensors::HostTensor,
};
use crate::{
    FsepRuntime,
    burn_compat::ParamState,
    comm::Operation,
    moe::ExpertsInfo,
    ops::WeightStorage,
    shard::{WholeExperts, part_id},
};

const STATES: Operation = Operation::new("optimizer state of whole experts");

/// States of parameters, by id.
pub(super) type States = BTreeMap<u64, ParamState<HostTensor>>;

/// What is equal in the states of all parts of a layer's experts. A rank without experts learns it from rank 0, which has some.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
struct Fields {
    tensors: Vec<(String, Dtype)>,
    /// Name, type and bytes.
    scalars: Vec<(String, Dtype, Vec<u8>)>,
}

impl Fields {
    fn of(state: &ParamState<HostTensor>) -> Self {
        let scalar = |(name, scalar): (&String, &_)| {
            let HostTensor { dtype, bytes, .. } = HostTensor::from_scalar(*scalar);
            (name.clone(), dtype, bytes.to_vec())
        };
        Self {
            tensors: state.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.dtype)).collect(),
            scalars: state.scalars.iter().map(scalar).collect(),
        }
    }
}

/// The state of a rank's whole experts of a layer.
struct OwnExperts<'a> {
    param: &'a ModelParam,
    info: ExpertsInfo,
    /// `None` if it has no experts.
    fields: Option<Fields>,
    /// Each tensor of the state: `[experts of the rank, N * S]`, padded behind each expert, or `[E / N, P]` of resident ones.
    rows: BTreeMap<String, Vec<u8>>,
}

/// Puts the states of experts' shards in the place of those of their matrices and biases. Collective.
///
/// # Errors
///
/// On all ranks if one has an error: [`CheckpointError::Unsupported`] if a state's tensors do not have the matrix's shape, or experts'
/// states differ in more than these; [`CheckpointError::Comm`].
pub(super) fn states_of_shards<'a>(
    runtime: &FsepRuntime,
    params: impl Iterator<Item = &'a ModelParam>,
    mut states: States,
) -> Result<States, CheckpointError> {
    let (comm, experts) = (runtime.comm(), runtime.groups().experts());
    // A parameter that stands in two places of a model has one state.
    let mut seen = HashSet::new();
    let own: Result<Vec<_>, _> = params
        .filter(|param| seen.insert(param.id))
        .filter_map(|param| Some((param, param.experts?)))
        .map(|(param, info)| OwnExperts::join(param, info, [experts.rank(), experts.size()], &mut states))
        .collect();
    let joined = own.and_then(|own| {
        let fields = to_json(&own.iter().map(|own| &own.fields).collect::<Vec<_>>())?;
        Ok((own, fields))
    });
    let (own, fields) = all_or_none(comm, STATES, joined)?;
    let first = gather(experts.as_ref(), STATES, &fields)?.swap_remove(0);
    let checked = serde_json::from_slice::<Vec<Option<Fields>>>(&first)
        .map_err(|error| CheckpointError::Unsupported { what: "optimizer".into(), reason: error.to_string() })
        .and_then(|first| {
            let differs =
                |(own, first): &(&OwnExperts<'_>, &Option<Fields>)| own.fields.is_some() && own.fields != **first;
            match own.iter().zip(&first).find(differs) {
                _ if own.len() != first.len() => {
                    Err(CheckpointError::Config("ranks have models of different numbers of layers with experts".into()))
                }
                Some((own, _)) => {
                    Err(own.unsupported("the states of its experts differ between ranks, which made other steps"))
                }
                None => Ok(first),
            }
        });
    let first = all_or_none(comm, STATES, checked)?;
    for (mut own, fields) in own.into_iter().zip(first) {
        let state = own.shards(runtime, fields.unwrap_or_default())?;
        states.insert(own.param.id.val(), state);
    }
    Ok(states)
}

impl<'a> OwnExperts<'a> {
    /// Takes the states of the parts of a rank's experts.
    fn join(
        param: &'a ModelParam,
        info: ExpertsInfo,
        [rank, ranks]: [usize; 2],
        states: &mut States,
    ) -> Result<Self, CheckpointError> {
        let mut own = Self { param, info, fields: None, rows: BTreeMap::new() };
        let (parts, whole) = (info.shape.parts(), WholeExperts { experts: info.num_experts, ranks });
        let row_len = match info.storage {
            WeightStorage::Sharded => info.shape.shard_len(ranks) * ranks,
            WeightStorage::Resident => info.shape.num_params(),
        };
        let experts = whole.of_rank(rank);
        let num_rows = experts.len();
        for (row, expert) in experts.enumerate() {
            for (place, part) in parts.iter().enumerate() {
                let mut state = states.remove(&part_id(param.id, expert, place).val()).unwrap_or_default();
                // As of the parameter `[E, S]`, also a bias's.
                state.set_num_dims(2);
                let found = Fields::of(&state);
                if *own.fields.get_or_insert_with(|| found.clone()) != found {
                    return Err(own.unsupported("the states of its matrices differ in their fields"));
                }
                for (field, tensor) in state.tensors {
                    if tensor.shape != part.dims {
                        return Err(own.unsupported(&format!(
                            "the optimizer's `{field}` of a matrix {:?} has the shape {:?}, and a checkpoint has a place for that of the \
                             matrix only",
                            part.dims, tensor.shape
                        )));
                    }
                    let size = tensor.dtype.bitsize() / 8;
                    let rows = own.rows.entry(field).or_insert_with(|| vec![0; num_rows * row_len * size]);
                    let start = (row * row_len + part.range.start) * size;
                    rows[start..start + tensor.bytes.len()].copy_from_slice(&tensor.bytes);
                }
            }
        }
        Ok(own)
    }

    /// The state of this rank's shards, which has these fields. Collective.
    fn shards(&mut self, runtime: &FsepRuntime, fields: Fields) -> Result<ParamState<HostTensor>, CheckpointError> {
        let comm = runtime.groups().experts();
        let (info, ranks) = (&self.info, comm.size());
        let shape = Sharding::new(info, ranks).shape();
        let whole = WholeExperts { experts: info.num_experts, ranks };
        let mut state = ParamState::default();
        for (field, dtype) in fields.tensors {
            let mut rows = self.rows.remove(&field).unwrap_or_default();
            if info.storage == WeightStorage::Sharded && ranks > 1 {
                let size = dtype.bitsize() / 8;
                let plan = whole.gather(comm.rank(), shape[1]).reversed().scaled(size);
                let sent = Arc::new(Bytes::from_bytes_vec(rows));
                rows = vec![0; plan.recv_len];
                comm.start_all_to_all_v(STATES, sent, plan)?.wait(&mut rows)?;
            }
            let tensor = HostTensor { dtype, shape: shape.to_vec(), bytes: Bytes::from_bytes_vec(rows) };
            state.tensors.insert(field, tensor);
        }
        for (name, dtype, bytes) in fields.scalars {
            let scalar = HostTensor { dtype, shape: Vec::new(), bytes: Bytes::from_bytes_vec(bytes) }.scalar();
            state.scalars.extend(scalar.map(|scalar| (name, scalar)));
        }
        Ok(state)
    }

    fn unsupported(&self, reason: &str) -> CheckpointError {
        CheckpointError::Unsupported { what: self.param.path.clone(), reason: reason.into() }
    }
}

/// The states of the parts of a rank's whole experts, with their ids, from that of all of them, whose tensors are `[ceil(E / N), P]`.
pub(super) fn states_of_parts(
    info: &ExpertsInfo,
    weight: ParamId,
    [rank, ranks]: [usize; 2],
    state: &ParamState,
) -> Vec<(ParamId, ParamState)> {
    let (row_len, parts) = (info.shape.num_params(), info.shape.parts());
    let mut states = Vec::new();
    for (row, expert) in (WholeExperts { experts: info.num_experts, ranks }).of_rank(rank).enumerate() {
        for (place, part) in parts.iter().enumerate() {
            let start = row * row_len + part.range.start;
            let of_part = |tensor: &TensorData| {
                let size = tensor.dtype().size();
                let bytes = tensor.as_bytes()[start * size..(start + part.range.len()) * size].to_vec();
                TensorData::from_bytes_vec(bytes, part.dims.clone(), tensor.dtype())
            };
            let tensors = state.tensors.iter().map(|(field, tensor)| (field.clone(), of_part(tensor)));
            let mut state = ParamState { tensors: tensors.collect(), scalars: state.scalars.clone() };
            state.set_num_dims(part.dims.len());
            states.push((part_id(weight, expert, place), state));
        }
    }
    states
}
