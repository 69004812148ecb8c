//! Which tensors go where: the files of a folder that is to be written.

use std::{collections::BTreeMap, ops::Range};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde_json::json;

use super::{
    HubError, SaveConfig,
    decode::{file_float, size_of},
    hub_folder::Inner,
    json::Object,
    plan::{Plan, PlannedParam, Source},
    stored::Storage,
};

/// A bias that stays in single precision, as in transformers; no trained parameter there.
const CORRECTION_BIAS: &str = "e_score_correction_bias";

/// A tensor to be written.
#[derive(Debug)]
pub(super) struct OutTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: Dtype,
    pub origin: Origin,
}

/// Where its values are.
#[derive(Debug)]
pub(super) enum Origin {
    /// All of them a parameter's.
    Param(usize),
    /// Parts of the experts of a parameter, one after the other: which positions of which expert's flat vector.
    Experts(usize, Vec<(usize, Range<usize>)>),
    /// The folder's that was read.
    Folder,
}

/// A file to be written.
#[derive(Debug)]
pub(super) struct OutFile {
    pub name: String,
    /// Its first bytes.
    pub header: Vec<u8>,
    /// Its tensors in the order of their places, with where they start.
    pub tensors: Vec<(usize, u64)>,
    pub len: u64,
}

/// What is written.
#[derive(Debug)]
pub(super) struct Layout {
    pub tensors: Vec<OutTensor>,
    pub files: Vec<OutFile>,
    /// The index, where there are several files.
    pub index: Option<Object>,
}

impl OutTensor {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * size_of(self.dtype) as u64
    }
}

impl Layout {
    /// # Errors
    ///
    /// [`HubError::Option`].
    pub fn new(folder: &Inner, plan: &Plan, config: &SaveConfig) -> Result<Self, HubError> {
        let dtype = match config.dtype.map(|dtype| (dtype, file_float(dtype))) {
            None => None,
            Some((_, Some(dtype))) => Some(dtype),
            Some((dtype, None)) => return Err(HubError::Option(format!("files have no type {dtype:?}"))),
        };
        if config.max_shard_size == 0 {
            return Err(HubError::Option(
                "files of 0 bytes hold no tensor: `max_shard_size` must be at least 1".into(),
            ));
        }
        let tensors = tensors(folder, plan, dtype);
        let groups = shards(&tensors, config.max_shard_size);
        let count = groups.len();
        let mut files = Vec::with_capacity(count);
        let mut map = Object::new();
        for (number, group) in groups.into_iter().enumerate() {
            let suffix = if count == 1 { String::new() } else { format!("-{:05}-of-{count:05}", number + 1) };
            let name = format!("model{suffix}.safetensors");
            map.extend(group.iter().map(|&tensor| (tensors[tensor].name.clone(), json!(name))));
            files.push(OutFile::new(name, &tensors, group, &folder.files[0].metadata)?);
        }
        let total_size: u64 = tensors.iter().map(OutTensor::bytes).sum();
        let is_parameter = |tensor: &&OutTensor| !tensor.name.ends_with(CORRECTION_BIAS);
        let parameters: usize =
            tensors.iter().filter(is_parameter).map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        let index = (count > 1).then(|| {
            let metadata = json!({ "total_parameters": parameters, "total_size": total_size });
            Object::from_iter([("metadata".into(), metadata), ("weight_map".into(), map.into())])
        });
        Ok(Self { tensors, files, index })
    }
}

/// All tensors, in the order in which they go to files: the model's, then what the model has not.
fn tensors(folder: &Inner, plan: &Plan, dtype: Option<Dtype>) -> Vec<OutTensor> {
    let tensor = |name: &str, origin| {
        let stored = folder.stored.get(name).expect("plans name tensors of their folder");
        let mut shape = stored.shape.clone();
        // What is in blocks is [out, in], but [in, out] where it is not.
        if matches!(stored.storage, Storage::Mxfp4 { .. }) {
            let last = shape.len() - 1;
            shape.swap(last - 1, last);
        }
        let dtype = dtype.filter(|_| !name.ends_with(CORRECTION_BIAS)).unwrap_or(stored.dtype());
        OutTensor { name: name.into(), shape, dtype, origin }
    };
    let mut all = Vec::new();
    for (place, PlannedParam { source, .. }) in plan.params.iter().enumerate() {
        let parts = match source {
            Source::Tensor(name, _) => {
                all.push(tensor(name, Origin::Param(place)));
                continue;
            }
            Source::Experts(parts) => parts,
        };
        let mut names: Vec<&str> = Vec::new();
        let mut slices: BTreeMap<&str, Vec<(usize, Range<usize>)>> = BTreeMap::new();
        for (expert, part) in parts.iter().enumerate().flat_map(|(e, parts)| parts.iter().map(move |part| (e, part))) {
            let slices = slices.entry(&part.tensor).or_insert_with(|| {
                names.push(&part.tensor);
                Vec::new()
            });
            let end = part.at + part.view.len();
            match slices.last_mut() {
                // Parts of one tensor follow each other.
                Some((last, range)) if *last == expert => range.end = end,
                _ => slices.push((expert, part.at..end)),
            }
        }
        for name in names {
            let slices = slices.remove(name).unwrap_or_default();
            all.push(tensor(name, Origin::Experts(place, slices)));
        }
    }
    all.extend(plan.ignored.iter().map(|name| tensor(name, Origin::Folder)));
    all
}

/// Tensors of each file: as many as fit, as in `split_torch_state_dict_into_shards`.
fn shards(tensors: &[OutTensor], most: u64) -> Vec<Vec<usize>> {
    let (mut files, mut current, mut size) = (Vec::new(), Vec::new(), 0u64);
    for (tensor, bytes) in tensors.iter().map(OutTensor::bytes).enumerate() {
        if bytes > most {
            files.push(vec![tensor]);
            continue;
        }
        if size + bytes > most {
            files.push(std::mem::take(&mut current));
            size = 0;
        }
        current.push(tensor);
        size += bytes;
    }
    if !current.is_empty() {
        files.push(current);
    }
    files
}

impl OutFile {
    fn new(
        name: String,
        tensors: &[OutTensor],
        mut group: Vec<usize>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, HubError> {
        // As the format's own library does: wide types first, so that everything is aligned.
        group.sort_by(|&a, &b| {
            let (a, b) = (&tensors[a], &tensors[b]);
            b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name))
        });
        let mut offset = 0;
        let mut infos = Vec::with_capacity(group.len());
        let mut placed = Vec::with_capacity(group.len());
        for index in group {
            let OutTensor { name, shape, dtype, .. } = &tensors[index];
            let end = offset + tensors[index].bytes() as usize;
            infos.push((name.clone(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (offset, end) }));
            placed.push((index, offset as u64));
            offset = end;
        }
        let metadata = metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let invalid =
            |error: &dyn std::fmt::Display| HubError::Option(format!("the table of {name} is invalid: {error}"));
        let table = Metadata::new(Some(metadata), infos).map_err(|error| invalid(&error))?;
        let mut json = serde_json::to_vec(&table).map_err(|error| invalid(&error))?;
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.extend(json);
        let start = header.len() as u64;
        placed.iter_mut().for_each(|(_, at)| *at += start);
        Ok(Self { name, header, tensors: placed, len: start + offset as u64 })
    }
}
