use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::{module::Module, optim::ModuleOptimizer};
use burn_fsep_planner::Layout;

use super::{
    CheckpointError, CheckpointedOptimizer, Checkpoints, HeldState, TrainingProgress,
    all_or_none::{Work, all_or_none, gather},
    content::{Content, StatePart, check_files},
    folder::checkpoints,
    manifest::{Manifest, ParameterEntry},
    model::{ModelParam, load_values, model_params},
    reshard::Sharding,
    whole_experts::states_of_parts,
};
use crate::{
    FsepRuntime,
    burn_compat::{StateError, load_states},
    comm::{Operation, agree},
};

const FIND: Operation = Operation::new("list of checkpoints");
const CHECK: Operation = Operation::new("manifest of a checkpoint");
const READ: Operation = Operation::new("content of a checkpoint");
const APPLY: Operation = Operation::new("loading of a checkpoint");

/// What a checkpoint gave.
#[derive(Clone)]
pub struct Loaded<M, O = ModuleOptimizer> {
    /// The model with the checkpoint's parameters.
    pub model: M,
    /// The optimizer with the checkpoint's state.
    pub optimizer: O,
    /// Where training stood.
    pub progress: TrainingProgress,
    /// The checkpoint.
    pub path: PathBuf,
    /// What is wrong with newer checkpoints, which were skipped.
    pub skipped: Vec<CheckpointError>,
}

impl<M, O> fmt::Debug for Loaded<M, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, progress, skipped, .. } = self;
        let mut debug = f.debug_struct("Loaded");
        debug.field("path", path).field("progress", progress).field("skipped", skipped).finish_non_exhaustive()
    }
}

/// Loads a checkpoint of any number of ranks. Collective.
///
/// Gives a model and an optimizer with the checkpoint's parameters and state in the place of those of `model` and
/// `optimizer`, which stay as they are, but for running statistics (`BatchNorm`), which clones share. If the number of
/// ranks and slots is the checkpoint's, the runtime's layers get its layouts.
///
/// # Errors
///
/// On all ranks if one has an error, and then nothing was changed: [`CheckpointError::Damaged`] naming the file that is
/// cut off, changed, missing or of another checkpoint; [`CheckpointError::Version`] for a newer format;
/// [`CheckpointError::Model`] or [`CheckpointError::Optimizer`] if they are not those that were saved;
/// [`CheckpointError::Divergence`] if ranks see different checkpoints; [`CheckpointError::Io`], [`CheckpointError::Peer`]
/// on ranks that have no error themselves, [`CheckpointError::Comm`] if a rank is lost.
pub fn load<M: Module, O: CheckpointedOptimizer>(
    checkpoint: impl Into<PathBuf>,
    runtime: &FsepRuntime,
    model: &M,
    optimizer: &O,
) -> Result<Loaded<M, O>, CheckpointError> {
    let path: PathBuf = checkpoint.into();
    let comm = runtime.comm();
    let checked = model_params(runtime, model).and_then(|params| {
        let (manifest, digest) = Manifest::read(&path)?;
        check_fits(&path, &manifest, &params)?;
        let layouts = layouts(&path, &manifest, &params, runtime)?;
        let parts = state_parts(&path, &manifest, &params, runtime, O::HELD)?;
        Ok((params, manifest, layouts, parts, digest))
    });
    let (params, manifest, layouts, parts, digest) = all_or_none(comm, CHECK, checked)?;
    if let Some(difference) = agree(comm, CHECK, &[("the checkpoint that they load", digest)])? {
        let hint = "it has to lie on a file system that all ranks share";
        return Err(CheckpointError::Divergence { what: difference.field, rank: difference.rank, hint });
    }

    let (rank, ranks, experts) = (comm.rank(), comm.size(), runtime.groups().experts());
    let (shard, shards) = (experts.rank(), experts.size());
    let (params, manifest) = (Arc::new(params), Arc::new(manifest));
    let reading = {
        let (path, params, manifest) = (path.clone(), params.clone(), manifest.clone());
        Work::start(move || {
            // Every file is checked by one of the ranks.
            check_files(&path, &manifest, |file| file % ranks == rank)?;
            Content::read(&path, &manifest, &params, &parts, shard, shards)
        })
    };
    let Content { values, states, records } = reading.finish(comm, READ)?;
    // What the optimizer keeps states of: parameters, or parts of the experts that this rank steps whole.
    let (mut places, mut placed) = (Vec::new(), Vec::new());
    for (param, state) in params.iter().zip(states) {
        let states = match param.experts.filter(|_| O::HELD == HeldState::OwnExperts) {
            Some(info) => states_of_parts(&info, param.id, [shard, shards], &state),
            None => vec![(param.id, state)],
        };
        for (id, state) in states {
            places.push((id, param.path.as_str()));
            placed.push(state);
        }
    }
    let loaded =
        load_states(optimizer.module_optimizer(), &places, placed).map_err(
            |StateError { place, reason }| match place {
                Some(place) => CheckpointError::Optimizer {
                    checkpoint: path.clone(),
                    parameter: places[place].1.to_string(),
                    reason,
                },
                None => CheckpointError::Unsupported { what: "optimizer".into(), reason },
            },
        );
    let optimizer = optimizer.with_state(all_or_none(comm, APPLY, loaded)?);
    // Last: Burn's clones share running statistics, which this sets in `model`, too.
    let model = all_or_none(comm, APPLY, load_values(model, &params, values))?;
    for (layer, layout) in layouts {
        let failed = |error: crate::FsepError| CheckpointError::Config(error.to_string());
        runtime.resume_layout(layer, Arc::new(layout)).map_err(failed)?;
    }
    let progress = TrainingProgress { records, ..manifest.progress() };
    Ok(Loaded { model, optimizer, progress, path, skipped: Vec::new() })
}

impl Checkpoints {
    /// Loads the newest checkpoint of the folder as [`load`] does; `None` if there is none. Collective.
    ///
    /// # Errors
    ///
    /// As [`load`], also if an older checkpoint could be loaded.
    pub fn load_newest<M: Module, O: CheckpointedOptimizer>(
        &self,
        model: &M,
        optimizer: &O,
    ) -> Result<Option<Loaded<M, O>>, CheckpointError> {
        let Some(path) = self.list_together()?.pop() else { return Ok(None) };
        load(path, &self.runtime, model, optimizer).map(Some)
    }

    /// Loads the newest checkpoint of the folder that is not damaged; `None` if there is none at all. Collective.
    /// [`Loaded::skipped`] says what is wrong with newer ones.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::NoneWhole`] if all are damaged; as [`load`] for anything but damage.
    pub fn load_newest_whole<M: Module, O: CheckpointedOptimizer>(
        &self,
        model: &M,
        optimizer: &O,
    ) -> Result<Option<Loaded<M, O>>, CheckpointError> {
        let mut skipped: Vec<CheckpointError> = Vec::new();
        for path in self.list_together()?.into_iter().rev() {
            match load(path, &self.runtime, model, optimizer) {
                Ok(loaded) => return Ok(Some(Loaded { skipped, ..loaded })),
                Err(error) if error.is_damage() => skipped.push(error),
                Err(error) => return Err(error),
            }
        }
        let folder = self.config.folder.clone();
        match skipped.first() {
            None => Ok(None),
            Some(newest) => {
                Err(CheckpointError::NoneWhole { folder, count: skipped.len(), newest: newest.to_string() })
            }
        }
    }

    /// The checkpoints that rank 0 sees, oldest first.
    fn list_together(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        let (comm, folder) = (self.runtime.comm(), &self.config.folder);
        let found = if comm.rank() == 0 { checkpoints(folder) } else { Ok(Vec::new()) };
        let found = all_or_none(comm, FIND, found)?;
        let names = found.iter().filter_map(|(_, path)| path.file_name()?.to_str());
        let names = gather(comm, FIND, names.collect::<Vec<_>>().join("\n").as_bytes())?.swap_remove(0);
        let names = String::from_utf8_lossy(&names);
        Ok(names.lines().map(|name| folder.join(name)).collect())
    }
}

/// The checkpoints in a folder, oldest first. Damaged ones are among them: see [`verify`].
///
/// # Errors
///
/// [`CheckpointError::Io`] if the folder cannot be listed; one that does not exist has none.
pub fn list(folder: impl AsRef<Path>) -> Result<Vec<PathBuf>, CheckpointError> {
    Ok(checkpoints(folder.as_ref())?.into_iter().map(|(_, path)| path).collect())
}

/// What a checkpoint says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// World size `W` of the training that saved it.
    pub world_size: usize,
    /// Where training stood, without records.
    pub progress: TrainingProgress,
    /// Size of all its files, in bytes.
    pub bytes: u64,
}

/// Checks all files of a checkpoint, without a model and without other ranks.
///
/// # Errors
///
/// [`CheckpointError::Damaged`], [`CheckpointError::Version`] or [`CheckpointError::Io`].
pub fn verify(checkpoint: impl AsRef<Path>) -> Result<CheckpointInfo, CheckpointError> {
    let path = checkpoint.as_ref();
    let (manifest, _) = Manifest::read(path)?;
    check_files(path, &manifest, |_| true)?;
    let bytes = manifest.files.iter().map(|file| file.bytes).sum();
    Ok(CheckpointInfo { world_size: manifest.world_size * manifest.groups, progress: manifest.progress(), bytes })
}

/// Checks that a checkpoint is one of this model.
fn check_fits(path: &Path, manifest: &Manifest, params: &[ModelParam]) -> Result<(), CheckpointError> {
    let unfit = |parameter: &str, reason: String| {
        Err(CheckpointError::Model { checkpoint: path.to_path_buf(), parameter: parameter.into(), reason })
    };
    for param in params {
        let Some(saved) = manifest.parameter(&param.path) else {
            return unfit(&param.path, "is not in the checkpoint".into());
        };
        if let Some(reason) = difference(saved, param) {
            return unfit(&param.path, reason);
        }
    }
    if let Some(saved) = manifest.parameters.iter().find(|saved| params.iter().all(|param| param.path != saved.path)) {
        return unfit(&saved.path, "is in the checkpoint, not in the model".into());
    }
    Ok(())
}

fn difference(saved: &ParameterEntry, param: &ModelParam) -> Option<String> {
    if saved.dtype != param.dtype {
        return Some(format!("is {} in the checkpoint, {} in the model", saved.dtype, param.dtype));
    }
    match (saved.experts.as_ref().map(|experts| experts.info), param.experts) {
        (None, None) if saved.shape != param.shape => {
            Some(format!("is {:?} in the checkpoint, {:?} in the model", saved.shape, param.shape))
        }
        (Some(saved), Some(model)) if (saved.num_experts, saved.shape) != (model.num_experts, model.shape) => {
            let describe = |info: crate::moe::ExpertsInfo| {
                format!("E = {}, D = {}, F = {}", info.num_experts, info.shape.hidden, info.shape.ffn)
            };
            Some(format!("has {} in the checkpoint, {} in the model", describe(saved), describe(model)))
        }
        (None, Some(_)) => Some("are experts in the model, not in the checkpoint".into()),
        (Some(_), None) => Some("are experts in the checkpoint, not in the model".into()),
        _ => None,
    }
}

/// The checkpoint's layouts, of layers that can use them.
fn layouts(
    path: &Path,
    manifest: &Manifest,
    params: &[ModelParam],
    runtime: &FsepRuntime,
) -> Result<Vec<(usize, Layout)>, CheckpointError> {
    let mut layouts = Vec::new();
    for param in params {
        let (Some(info), Some(saved)) = (param.experts, manifest.parameter(&param.path)) else { continue };
        let Some(saved) = &saved.experts else { continue };
        let (group, groups) = (runtime.groups().replicas().rank(), runtime.groups().replicas().size());
        // Of another number of groups the first one's.
        let group = if groups == manifest.groups { group } else { 0 };
        let rows = saved.layout.chunks_exact(manifest.world_size).nth(group).unwrap_or_default();
        let layout = Layout::from_rows(info.num_experts, rows)
            .map_err(|error| CheckpointError::damaged(path, format!("the layout of `{}`: {error}", param.path)))?;
        let current = runtime.layout(info.layer);
        let same_slots =
            (layout.num_ranks(), layout.slots_per_rank()) == (current.num_ranks(), current.slots_per_rank());
        if same_slots && !runtime.has_fixed_layout(info.layer) {
            layouts.push((info.layer, layout));
        }
    }
    Ok(layouts)
}

/// Which part of each parameter's optimizer state this rank reads, where it does not read all of it.
fn state_parts(
    path: &Path,
    manifest: &Manifest,
    params: &[ModelParam],
    runtime: &FsepRuntime,
    held: HeldState,
) -> Result<Vec<Option<StatePart>>, CheckpointError> {
    let part = |param: &ModelParam| {
        if let Some(info) = param.experts.filter(|_| held == HeldState::OwnExperts) {
            return Ok(Some(StatePart::Experts(Sharding::runs(&info, runtime.groups().experts().size()))));
        }
        let Some((parts, replicas)) = param.state_parts(runtime, held) else { return Ok(None) };
        let state = manifest.parameter(&param.path).into_iter().flat_map(|saved| &saved.state);
        for (field, saved) in state {
            if param.experts.is_none() && saved.shape != param.value_shape {
                let reason = format!(
                    "has a `{field}` of the shape {:?}, not the parameter's, {:?}, and cannot be cut over ranks: it is of an \
                     optimizer that does not work element by element",
                    saved.shape, param.value_shape
                );
                let (checkpoint, parameter) = (path.to_path_buf(), param.path.clone());
                return Err(CheckpointError::Optimizer { checkpoint, parameter, reason });
            }
        }
        let (shape, range) = (parts.part_shape(param.value_shape.len()), parts.range(replicas.rank()));
        Ok(Some(StatePart::Cut { shape, range }))
    };
    params.iter().map(part).collect()
}
