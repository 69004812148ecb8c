use std::{collections::BTreeMap, fmt::Display, io::Read, path::Path};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    CheckpointError, TrainingProgress,
    reshard::Sharding,
    tensors::{burn_dtype, check_len, hex, open},
};
use crate::{comm::digest, moe::ExpertsInfo, ops::WeightStorage};

/// What the manifest of this version says of itself.
const FORMAT: &str = "burn-fsep checkpoint";
/// Of several groups; that of one is version 1, which older programs read.
const VERSION: u32 = 2;
pub(super) const MANIFEST: &str = "manifest.json";
/// One line as `sha256sum` writes it.
pub(super) const MANIFEST_SUM: &str = "manifest.sha256";
pub(super) const REPLICATED: &str = "replicated.safetensors";
/// Far more than any model's manifest needs.
const MAX_MANIFEST: u64 = 1 << 28;

/// The file of a rank's experts.
pub(super) fn experts_file(rank: usize, world_size: usize) -> String {
    format!("experts-{rank:05}-of-{world_size:05}.safetensors")
}

/// Names of tensors in the files of a checkpoint. Paths and fields have dots, but no slashes.
pub(super) fn param_name(path: &str) -> String {
    format!("model/{path}")
}

pub(super) fn state_name(path: &str, field: &str) -> String {
    format!("optimizer/{path}/{field}")
}

pub(super) fn scalar_name(path: &str, field: &str) -> String {
    format!("optimizer-scalar/{path}/{field}")
}

pub(super) fn record_name(name: &str) -> String {
    format!("record/{name}")
}

/// What a checkpoint is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub format: String,
    pub version: u32,
    /// Program that wrote it.
    pub writer: String,
    /// Ranks that share the experts, `N`: there is a file of each.
    pub world_size: usize,
    /// Groups of such ranks, which have the same experts, each under layouts of its own.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub groups: usize,
    pub step: u64,
    pub epoch: u64,
    pub iteration: u64,
    pub metadata: BTreeMap<String, String>,
    /// Names of the user's records.
    pub records: Vec<String>,
    /// In the model's order.
    pub parameters: Vec<ParameterEntry>,
    /// The replicated parameters' file, then each rank's.
    pub files: Vec<FileEntry>,
}

/// A parameter and its optimizer state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ParameterEntry {
    /// Where it stands in the model.
    pub path: String,
    /// Its name in unsharded files.
    pub name: String,
    pub dtype: Dtype,
    /// Of experts: of each rank's part.
    pub shape: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertsEntry>,
    /// Tensors of the optimizer's state. Those of experts have the parameter's shape.
    pub state: BTreeMap<String, StateEntry>,
    /// Scalars of the optimizer's state.
    pub scalars: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StateEntry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// The experts of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExpertsEntry {
    #[serde(flatten)]
    pub info: ExpertsInfo,
    /// The layer's layout: the expert of each slot of each rank, one group's ranks after the other's. `[W, C]`
    pub layout: Vec<Vec<u32>>,
}

/// A file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    pub name: String,
    pub bytes: u64,
    pub sha256: String,
}

/// What every version's manifest has.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u32,
    writer: String,
}

fn one() -> usize {
    1
}

fn is_one(groups: &usize) -> bool {
    *groups == 1
}

impl Manifest {
    /// Of `groups` groups of `world_size` ranks.
    pub fn new([groups, world_size]: [usize; 2], progress: &TrainingProgress, parameters: Vec<ParameterEntry>) -> Self {
        Self {
            format: FORMAT.into(),
            version: if groups > 1 { VERSION } else { 1 },
            writer: concat!("burn-fsep ", env!("CARGO_PKG_VERSION")).into(),
            world_size,
            groups,
            step: progress.step,
            epoch: progress.epoch,
            iteration: progress.iteration,
            metadata: progress.metadata.clone(),
            records: progress.records.keys().cloned().collect(),
            parameters,
            files: Vec::new(),
        }
    }

    /// The manifest and its checksum line.
    pub fn to_bytes(&self) -> Result<(Vec<u8>, Vec<u8>), CheckpointError> {
        let mut bytes = serde_json::to_vec_pretty(self).map_err(unwritable)?;
        bytes.push(b'\n');
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(unwritable(format!("it has {} bytes, {MAX_MANIFEST} are allowed", bytes.len())));
        }
        let sum = checksum_line(&bytes);
        Ok((bytes, sum.into_bytes()))
    }

    /// Reads and checks a checkpoint's manifest; gives its digest, too.
    pub fn read(checkpoint: &Path) -> Result<(Self, u64), CheckpointError> {
        let path = checkpoint.join(MANIFEST);
        let bytes = read_small(&path)?;
        let sum_path = checkpoint.join(MANIFEST_SUM);
        if read_small(&sum_path)? != checksum_line(&bytes).as_bytes() {
            return Err(CheckpointError::damaged(&path, format!("its checksum is not the one in {MANIFEST_SUM}")));
        }
        let damaged = |reason: String| CheckpointError::damaged(&path, reason);
        let header: Header =
            serde_json::from_slice(&bytes).map_err(|error| damaged(format!("it is no manifest: {error}")))?;
        if header.format != FORMAT {
            return Err(damaged(format!("its format is `{}`, not `{FORMAT}`", header.format)));
        }
        if !(1..=VERSION).contains(&header.version) {
            return Err(CheckpointError::Version {
                path: path.clone(),
                found: header.version,
                newest: VERSION,
                writer: header.writer,
            });
        }
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok((manifest, digest(&bytes)))
    }

    /// What a manifest promises beyond its form.
    fn check(&self) -> Result<(), String> {
        let ranks = self.world_size;
        if ranks == 0 || self.files.len().checked_sub(1) != Some(ranks) {
            return Err(format!("it lists {} files of {ranks} ranks", self.files.len()));
        }
        let all_ranks = ranks.checked_mul(self.groups).filter(|&all| all > 0);
        let all_ranks = all_ranks.ok_or_else(|| format!("it is of {} groups of {ranks} ranks", self.groups))?;
        let expected = std::iter::once(REPLICATED.to_string()).chain((0..ranks).map(|r| experts_file(r, ranks)));
        for (file, expected) in self.files.iter().zip(expected) {
            if file.name != expected {
                return Err(format!("it lists `{}` in the place of {expected}", file.name));
            }
        }
        for parameter in &self.parameters {
            let mut dtypes = parameter.state.values().map(|state| state.dtype).chain([parameter.dtype]);
            if let Some(dtype) = dtypes.find(|&dtype| burn_dtype(dtype).is_none()) {
                return Err(format!("`{}` has the type {dtype}, which Burn does not have", parameter.path));
            }
            let Some(experts) = &parameter.experts else { continue };
            if experts.layout.len() != all_ranks {
                return Err(format!("the layout of `{}` is not of {all_ranks} ranks", parameter.path));
            }
            let ExpertsInfo { num_experts, shape, storage, .. } = experts.info;
            let whole = [3, shape.hidden, shape.ffn, num_experts, ranks];
            let countable = whole.into_iter().try_fold(1, usize::checked_mul).is_some();
            let owners = storage == WeightStorage::Sharded || num_experts.is_multiple_of(ranks);
            if !countable || !owners || parameter.shape != Sharding::new(&experts.info, ranks).shape() {
                return Err(format!("`{}` has the impossible shape {:?}", parameter.path, parameter.shape));
            }
            if let Some((leaf, state)) = parameter.state.iter().find(|(_, state)| state.shape != parameter.shape) {
                return Err(format!("state `{leaf}` of `{}` has the shape {:?}", parameter.path, state.shape));
            }
        }
        Ok(())
    }

    /// What the manifest says of the parameter at a place of the model.
    pub fn parameter(&self, path: &str) -> Option<&ParameterEntry> {
        self.parameters.iter().find(|entry| entry.path == path)
    }

    /// The progress without the user's records, which are in the replicated file.
    pub fn progress(&self) -> TrainingProgress {
        TrainingProgress {
            step: self.step,
            epoch: self.epoch,
            iteration: self.iteration,
            metadata: self.metadata.clone(),
            records: BTreeMap::new(),
        }
    }
}

/// What goes from rank to rank.
pub(super) fn to_json(value: &impl Serialize) -> Result<Vec<u8>, CheckpointError> {
    serde_json::to_vec(value).map_err(unwritable)
}

pub(super) fn unwritable(reason: impl Display) -> CheckpointError {
    CheckpointError::Unsupported { what: "manifest".into(), reason: reason.to_string() }
}

fn checksum_line(manifest: &[u8]) -> String {
    format!("{}  {MANIFEST}\n", hex(&Sha256::digest(manifest)))
}

fn read_small(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let failed = CheckpointError::io("read", path);
    let mut file = open(path)?;
    let len = file.metadata().map_err(&failed)?.len();
    if len > MAX_MANIFEST {
        return Err(CheckpointError::damaged(path, format!("it has {len} bytes, far too many")));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.by_ref().take(MAX_MANIFEST).read_to_end(&mut bytes).map_err(&failed)?;
    check_len(path, bytes.len() as u64, len)?;
    Ok(bytes)
}
