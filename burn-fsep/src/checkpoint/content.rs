use std::{collections::BTreeMap, fs, ops::Range, path::Path};

use burn::tensor::TensorData;
use burn_pack::Scalar;
use safetensors::Dtype;

use super::{
    CheckpointError,
    manifest::{Manifest, ParameterEntry, REPLICATED, experts_file, param_name, record_name, scalar_name, state_name},
    model::ModelParam,
    reshard::{Overlap, Sharding},
    tensors::{TensorFile, burn_dtype, byte_len, check_file, check_len, not_there},
};
use crate::burn_compat::{ParamState, check_scalar};

/// A rank's part of a checkpoint, in the model's order.
pub(super) struct Content {
    pub values: Vec<TensorData>,
    pub states: Vec<ParamState>,
    pub records: BTreeMap<String, Vec<u8>>,
}

/// The part of a state's tensors that a rank keeps.
pub(super) enum StatePart {
    /// Of the parameter as this rank has it.
    Cut {
        /// Of each tensor, with padding.
        shape: Vec<usize>,
        /// Its elements in the whole tensor.
        range: Range<usize>,
    },
    /// That of whole experts, of all ranks' shards.
    Experts(Sharding),
}

/// Checks the sizes of all files, and checksum and table of those that `is_ours` picks by their place in the manifest.
pub(super) fn check_files(
    checkpoint: &Path,
    manifest: &Manifest,
    is_ours: impl Fn(usize) -> bool,
) -> Result<(), CheckpointError> {
    for file in &manifest.files {
        let path = checkpoint.join(&file.name);
        let found = fs::metadata(&path).map_err(not_there("read", &path))?;
        check_len(&path, found.len(), file.bytes)?;
    }
    for (place, file) in manifest.files.iter().enumerate().filter(|(place, _)| is_ours(*place)) {
        check_file(checkpoint, file)?;
        let tensors = TensorFile::open(checkpoint.join(&file.name))?;
        check_table(&tensors, manifest, place == 0)?;
    }
    Ok(())
}

/// Checks that a file has the tensors that the manifest says, and no others.
fn check_table(file: &TensorFile, manifest: &Manifest, is_replicated: bool) -> Result<(), CheckpointError> {
    let mut expected = Vec::new();
    for entry in &manifest.parameters {
        if entry.experts.is_some() != is_replicated {
            for tensor in tensors_of(entry) {
                file.expect(&tensor.name, tensor.dtype, tensor.shape)?;
                expected.push(tensor.name);
            }
        }
        if is_replicated {
            expected.extend(entry.scalars.iter().map(|field| scalar_name(&entry.path, field)));
        }
    }
    if is_replicated {
        expected.extend(manifest.records.iter().map(|name| record_name(name)));
    }
    expected.sort();
    let names = file.names();
    match names.iter().find(|name| expected.binary_search(name).is_err()) {
        Some(name) => Err(CheckpointError::damaged(&file.path, format!("it has a tensor `{name}` too many"))),
        None => Ok(()),
    }
}

impl Content {
    /// Reads what rank `rank` of `ranks` needs, of parameters' optimizer states these parts. Memory is taken for what the model needs,
    /// whatever files claim.
    pub fn read(
        checkpoint: &Path,
        manifest: &Manifest,
        params: &[ModelParam],
        state_parts: &[Option<StatePart>],
        rank: usize,
        ranks: usize,
    ) -> Result<Self, CheckpointError> {
        let mut replicated = TensorFile::open(checkpoint.join(REPLICATED))?;
        let mut all = Vec::with_capacity(params.len());
        for (param, state_part) in params.iter().zip(state_parts) {
            let entry = manifest
                .parameter(&param.path)
                .ok_or_else(|| CheckpointError::damaged(checkpoint, format!("its manifest lacks `{}`", param.path)))?;
            let scalars = read_scalars(&mut replicated, entry)?;
            let shardings = param
                .experts
                .zip(entry.experts.as_ref())
                .map(|(info, saved)| (Sharding::new(&saved.info, manifest.world_size), Sharding::new(&info, ranks)));
            let parts: Result<Vec<_>, _> = match &shardings {
                None => {
                    tensors_of(entry).map(|tensor| Part::read(&mut replicated, tensor, state_part.as_ref())).collect()
                }
                Some((_, to)) => {
                    let shape = |tensor: &Entry<'_>| match state_part {
                        Some(StatePart::Cut { shape, .. }) if tensor.field.is_some() => shape.clone(),
                        Some(StatePart::Experts(owned)) if tensor.field.is_some() => owned.shape().to_vec(),
                        _ => to.shape().to_vec(),
                    };
                    tensors_of(entry)
                        .map(|tensor| {
                            let shape = shape(&tensor);
                            Part::zeros(tensor, &shape)
                        })
                        .collect()
                }
            };
            all.push((parts?, scalars, shardings, state_part));
        }
        for source in 0..manifest.world_size {
            let mut file = None;
            for (parts, _, shardings, state_part) in &mut all {
                let Some((from, to)) = shardings else { continue };
                let values = from.overlaps(source, to, rank);
                let states = match state_part {
                    None => values.clone(),
                    Some(StatePart::Cut { range, .. }) => {
                        values.iter().filter_map(|overlap| overlap.within(range)).collect()
                    }
                    Some(StatePart::Experts(owned)) => from.overlaps(source, owned, rank),
                };
                if values.is_empty() && states.is_empty() {
                    continue;
                }
                let file = match &mut file {
                    Some(file) => file,
                    none => none.insert(TensorFile::open(checkpoint.join(experts_file(source, manifest.world_size)))?),
                };
                for part in parts {
                    let overlaps = if part.field.is_some() { &states } else { &values };
                    part.fill(file, &from.shape(), overlaps)?;
                }
            }
        }
        let mut records = BTreeMap::new();
        for name in &manifest.records {
            records.insert(name.clone(), replicated.read(&record_name(name))?.bytes.to_vec());
        }
        let (mut values, mut states) = (Vec::new(), Vec::new());
        for (parts, scalars, ..) in all {
            let mut tensors = BTreeMap::new();
            for part in parts {
                let (field, data) = part.into_data()?;
                match field {
                    None => values.push(data),
                    Some(field) => drop(tensors.insert(field, data)),
                }
            }
            states.push(ParamState { tensors, scalars });
        }
        Ok(Self { values, states, records })
    }
}

/// A tensor of a file: a parameter's value, or a field of its optimizer state.
pub(super) struct Entry<'a> {
    /// Of the optimizer state.
    pub field: Option<String>,
    pub name: String,
    pub dtype: Dtype,
    pub shape: &'a [usize],
}

fn tensors_of(entry: &ParameterEntry) -> impl Iterator<Item = Entry<'_>> {
    let value = Entry { field: None, name: param_name(&entry.path), dtype: entry.dtype, shape: &entry.shape };
    let state = entry.state.iter().map(|(field, state)| Entry {
        field: Some(field.clone()),
        name: state_name(&entry.path, field),
        dtype: state.dtype,
        shape: &state.shape,
    });
    std::iter::once(value).chain(state)
}

/// What a rank needs of a tensor, being read.
pub(super) struct Part {
    field: Option<String>,
    /// In the file.
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Part {
    /// Zeros of a shape of their own, to be filled.
    pub fn zeros(entry: Entry<'_>, shape: &[usize]) -> Result<Self, CheckpointError> {
        let Entry { field, name, dtype, .. } = entry;
        let too_large =
            || CheckpointError::Unsupported { what: name.clone(), reason: "it is larger than any memory".into() };
        let len = byte_len(dtype, shape).ok_or_else(too_large)?;
        Ok(Self { field, dtype, shape: shape.to_vec(), bytes: vec![0; len], name })
    }

    /// Reads a whole tensor; of a state its part, if there is one.
    fn read(file: &mut TensorFile, entry: Entry<'_>, part: Option<&StatePart>) -> Result<Self, CheckpointError> {
        if let (Some(StatePart::Cut { shape, range }), true) = (part, entry.field.is_some()) {
            let saved = entry.shape;
            let mut part = Self::zeros(entry, shape)?;
            part.fill(file, saved, &[Overlap { from: range.start, to: 0, len: range.len() }])?;
            return Ok(part);
        }
        // Before memory is taken: what a file has fits into it.
        let start = file.expect(&entry.name, entry.dtype, entry.shape)?;
        let shape = entry.shape;
        let mut part = Self::zeros(entry, shape)?;
        file.read_at(start, &mut part.bytes)?;
        Ok(part)
    }

    /// Reads runs of a tensor of the given shape.
    pub fn fill(
        &mut self,
        file: &mut TensorFile,
        saved: &[usize],
        overlaps: &[Overlap],
    ) -> Result<(), CheckpointError> {
        let start = file.expect(&self.name, self.dtype, saved)?;
        let size = self.dtype.bitsize() / 8;
        for Overlap { from, to, len } in overlaps {
            let target = &mut self.bytes[to * size..(to + len) * size];
            file.read_at(start + (from * size) as u64, target)?;
        }
        Ok(())
    }

    /// The field that it is of, and its content.
    pub fn into_data(self) -> Result<(Option<String>, TensorData), CheckpointError> {
        let Self { field, name, dtype, shape, bytes } = self;
        let reason = || format!("Burn has no type {dtype}");
        let dtype = burn_dtype(dtype).ok_or_else(|| CheckpointError::Unsupported { what: name, reason: reason() })?;
        Ok((field, TensorData::from_bytes_vec(bytes, shape, dtype)))
    }
}

fn read_scalars(file: &mut TensorFile, entry: &ParameterEntry) -> Result<BTreeMap<String, Scalar>, CheckpointError> {
    let mut scalars = BTreeMap::new();
    for field in &entry.scalars {
        let name = scalar_name(&entry.path, field);
        let path = file.path.clone();
        let damaged = |what: &str| CheckpointError::damaged(&path, format!("`{name}` {what}"));
        let scalar = file.read(&name)?.scalar().ok_or_else(|| damaged("is no scalar"))?;
        check_scalar(field, scalar, entry.shape.len(), entry.state.keys()).map_err(|reason| damaged(&reason))?;
        scalars.insert(field.clone(), scalar);
    }
    Ok(scalars)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{
        manifest::StateEntry,
        output::Disk,
        tensors::{HostTensor, write_tensors},
    };

    #[test]
    fn scalars_that_burn_would_trust_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateEntry { dtype: Dtype::F32, shape: vec![1] };
        let entry = ParameterEntry {
            path: "p".into(),
            name: "p".into(),
            dtype: Dtype::F32,
            shape: vec![1],
            experts: None,
            state: [("history.0".to_string(), state.clone()), ("history.1".to_string(), state)].into(),
            scalars: vec!["history.len".into()],
        };
        for len in [2, 1, u64::MAX] {
            let name = format!("{len}.safetensors");
            let scalar = HostTensor::from_scalar(Scalar::UInt(len));
            write_tensors(&Disk, folder.path(), &name, vec![(scalar_name("p", "history.len"), scalar)]).unwrap();
            let read = read_scalars(&mut TensorFile::open(folder.path().join(name)).unwrap(), &entry);
            assert_eq!(read.is_ok(), len == 2, "{len}");
        }
        let entry = ParameterEntry { scalars: vec!["__rank".into()], ..entry };
        for rank in [1, 0, 9] {
            let name = format!("rank-{rank}.safetensors");
            let scalar = HostTensor::from_scalar(Scalar::UInt(rank));
            write_tensors(&Disk, folder.path(), &name, vec![(scalar_name("p", "__rank"), scalar)]).unwrap();
            let read = read_scalars(&mut TensorFile::open(folder.path().join(name)).unwrap(), &entry);
            assert_eq!(read.is_ok(), rank == 1, "{rank}");
        }
    }
}
