use std::{collections::BTreeMap, fs, path::Path};

use burn::tensor::Bytes;
use burn_pack::Scalar;
use safetensors::Dtype;

use super::{
    CheckpointError,
    manifest::{Manifest, ParameterEntry, REPLICATED, experts_file, param_name, record_name, scalar_name, state_name},
    model::ModelParam,
    records::{ParamState, tensor_scalar},
    recut::{Cut, Piece},
    tensors::{HostTensor, TensorFile, byte_len, check_file, check_len},
};

/// A rank's part of a checkpoint, in the model's order.
pub(super) struct Content {
    pub values: Vec<HostTensor>,
    pub states: Vec<ParamState>,
    pub records: BTreeMap<String, Vec<u8>>,
}

/// Checks the sizes of all files, and checksum and table of those that `is_ours` picks by their place in the manifest.
pub(super) fn check_files(
    checkpoint: &Path,
    manifest: &Manifest,
    is_ours: impl Fn(usize) -> bool,
) -> Result<(), CheckpointError> {
    for file in &manifest.files {
        let path = checkpoint.join(&file.name);
        let found = fs::metadata(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => CheckpointError::damaged(&path, "it is missing"),
            _ => CheckpointError::io("read", &path)(error),
        })?;
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
            expected.push(param_name(&entry.path));
            file.expect(&expected[expected.len() - 1], entry.dtype, &entry.shape)?;
            for (field, state) in &entry.state {
                expected.push(state_name(&entry.path, field));
                file.expect(&expected[expected.len() - 1], state.dtype, &state.shape)?;
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
    /// Reads what rank `rank` of `ranks` needs. Memory is taken for what the model needs, whatever files claim.
    pub fn read(
        checkpoint: &Path,
        manifest: &Manifest,
        params: &[ModelParam],
        rank: usize,
        ranks: usize,
    ) -> Result<Self, CheckpointError> {
        let mut replicated = TensorFile::open(checkpoint.join(REPLICATED))?;
        let mut all = Vec::with_capacity(params.len());
        for param in params {
            let entry = manifest
                .parameter(&param.path)
                .ok_or_else(|| CheckpointError::damaged(checkpoint, format!("its manifest lacks `{}`", param.path)))?;
            let scalars = read_scalars(&mut replicated, entry)?;
            let cuts = param
                .experts
                .zip(entry.experts.as_ref())
                .map(|(info, saved)| (Cut::new(&saved.info, manifest.world_size), Cut::new(&info, ranks)));
            let parts = match &cuts {
                None => read_replicated(&mut replicated, entry)?,
                Some((_, to)) => parts_of(entry, &to.shape())?,
            };
            all.push((parts, scalars, cuts));
        }
        for source in 0..manifest.world_size {
            let mut file = None;
            for (parts, _, cuts) in &mut all {
                let Some((from, to)) = cuts else { continue };
                let pieces = from.pieces(source, to, rank);
                if pieces.is_empty() {
                    continue;
                }
                let file = match &mut file {
                    Some(file) => file,
                    none => none.insert(TensorFile::open(checkpoint.join(experts_file(source, manifest.world_size)))?),
                };
                for part in parts {
                    part.fill(file, &from.shape(), &pieces)?;
                }
            }
        }
        let mut records = BTreeMap::new();
        for name in &manifest.records {
            records.insert(name.clone(), replicated.read(&record_name(name))?.bytes.to_vec());
        }
        let (mut values, mut states) = (Vec::new(), Vec::new());
        for (parts, scalars, _) in all {
            let mut tensors = BTreeMap::new();
            for part in parts {
                let field = part.field.clone();
                let tensor = part.into_tensor();
                match field {
                    None => values.push(tensor),
                    Some(field) => drop(tensors.insert(field, tensor)),
                }
            }
            states.push(ParamState { tensors, scalars });
        }
        Ok(Self { values, states, records })
    }
}

/// A parameter, or a field of its optimizer state, being read.
pub(super) struct Part {
    /// Of the optimizer state.
    field: Option<String>,
    /// In the file.
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Part {
    /// A tensor of zeros, to be filled.
    pub fn zeros(field: Option<String>, name: String, dtype: Dtype, shape: &[usize]) -> Result<Self, CheckpointError> {
        let too_large =
            || CheckpointError::Unsupported { what: name.clone(), reason: "it is larger than any memory".into() };
        let len = byte_len(dtype, shape).ok_or_else(too_large)?;
        Ok(Self { field, dtype, shape: shape.to_vec(), bytes: vec![0; len], name })
    }

    /// Reads pieces of a tensor of the given shape.
    pub fn fill(&mut self, file: &mut TensorFile, saved: &[usize], pieces: &[Piece]) -> Result<(), CheckpointError> {
        let start = file.expect(&self.name, self.dtype, saved)?;
        let size = self.dtype.bitsize() / 8;
        for Piece { from, to, len } in pieces {
            let target = &mut self.bytes[to * size..(to + len) * size];
            file.read_at(start + (from * size) as u64, target)?;
        }
        Ok(())
    }

    pub fn into_tensor(self) -> HostTensor {
        HostTensor { dtype: self.dtype, shape: self.shape, bytes: Bytes::from_bytes_vec(self.bytes) }
    }
}

/// What a rank needs of experts: value and state fields, of the shape of the rank's parameter.
fn parts_of(entry: &ParameterEntry, shape: &[usize]) -> Result<Vec<Part>, CheckpointError> {
    let mut parts = vec![Part::zeros(None, param_name(&entry.path), entry.dtype, shape)?];
    for (field, state) in &entry.state {
        parts.push(Part::zeros(Some(field.clone()), state_name(&entry.path, field), state.dtype, shape)?);
    }
    Ok(parts)
}

fn read_replicated(file: &mut TensorFile, entry: &ParameterEntry) -> Result<Vec<Part>, CheckpointError> {
    let value = (None, param_name(&entry.path), entry.dtype, &entry.shape);
    let state = entry
        .state
        .iter()
        .map(|(field, state)| (Some(field.clone()), state_name(&entry.path, field), state.dtype, &state.shape));
    let mut parts = Vec::with_capacity(1 + entry.state.len());
    for (field, name, dtype, shape) in std::iter::once(value).chain(state) {
        // Before memory is taken: what a file has fits into it.
        let start = file.expect(&name, dtype, shape)?;
        let mut part = Part::zeros(field, name, dtype, shape)?;
        file.read_at(start, &mut part.bytes)?;
        parts.push(part);
    }
    Ok(parts)
}

/// Where Burn's records have the number of dimensions of the parameter that a state belongs to.
const RANK: &str = "__rank";

fn read_scalars(file: &mut TensorFile, entry: &ParameterEntry) -> Result<BTreeMap<String, Scalar>, CheckpointError> {
    let mut scalars = BTreeMap::new();
    for field in &entry.scalars {
        let name = scalar_name(&entry.path, field);
        let scalar = tensor_scalar(&file.read(&name)?);
        let damaged = || CheckpointError::damaged(&file.path, format!("tensor `{name}` is no scalar"));
        let scalar = scalar.ok_or_else(damaged)?;
        if field == RANK && u64::try_from(scalar) != Ok(entry.shape.len() as u64) {
            let reason = format!("`{name}` is not the number of dimensions of {:?}", entry.shape);
            return Err(CheckpointError::damaged(&file.path, reason));
        }
        // Burn takes memory for as many tensors as this says.
        if let Some(list) = field.strip_suffix(".len") {
            let prefix = format!("{list}.");
            let found = entry.state.keys().filter(|field| field.starts_with(&prefix)).count() as u64;
            if u64::try_from(scalar) != Ok(found) {
                let reason = format!("`{name}` does not say how many tensors there are, {found}");
                return Err(CheckpointError::damaged(&file.path, reason));
            }
        }
        scalars.insert(field.clone(), scalar);
    }
    Ok(scalars)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{manifest::StateEntry, output::Disk, records::scalar_tensor, tensors::write_tensors};

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
            let scalar = scalar_tensor(Scalar::UInt(len));
            write_tensors(&Disk, folder.path(), &name, vec![(scalar_name("p", "history.len"), scalar)]).unwrap();
            let read = read_scalars(&mut TensorFile::open(folder.path().join(name)).unwrap(), &entry);
            assert_eq!(read.is_ok(), len == 2, "{len}");
        }
        let entry = ParameterEntry { scalars: vec![RANK.into()], ..entry };
        for rank in [1, 0, 9] {
            let name = format!("rank-{rank}.safetensors");
            let scalar = scalar_tensor(Scalar::UInt(rank));
            write_tensors(&Disk, folder.path(), &name, vec![(scalar_name("p", RANK), scalar)]).unwrap();
            let read = read_scalars(&mut TensorFile::open(folder.path().join(name)).unwrap(), &entry);
            assert_eq!(read.is_ok(), rank == 1, "{rank}");
        }
    }

    #[test]
    fn scalars_keep_their_bits() {
        for scalar in [Scalar::Int(-3), Scalar::UInt(u64::MAX), Scalar::Float(0.1), Scalar::Bool(true)] {
            assert_eq!(tensor_scalar(&scalar_tensor(scalar)), Some(scalar));
        }
        let nan = f64::from_bits(0x7ff8_0000_0000_1234);
        let Some(Scalar::Float(read)) = tensor_scalar(&scalar_tensor(Scalar::Float(nan))) else { panic!("a float") };
        assert_eq!(read.to_bits(), nan.to_bits());
    }
}
