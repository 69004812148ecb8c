use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use burn::{module::Module, optim::OptimizerRecord};

use super::{
    CheckpointConfig, CheckpointError, CheckpointedOptimizer, HeldState, TrainingProgress,
    all_or_none::{Work, all_or_none, gather},
    folder,
    manifest::{
        ExpertsEntry, FileEntry, MANIFEST, MANIFEST_SUM, Manifest, ParameterEntry, REPLICATED, StateEntry,
        experts_file, param_name, record_name, scalar_name, state_name, to_json, unwritable,
    },
    output::{CreateFile, Disk},
    parts::gather_states,
    snapshot::{SavedParam, snapshot},
    tensors::{HostTensor, check_len, write_bytes, write_tensors},
};
use crate::{
    FsepRuntime,
    comm::{Communicator, Difference, Operation, agree, all_gather_u64, digest},
};

const START: Operation = Operation::new("start of a checkpoint");
const WRITE: Operation = Operation::new("files of a checkpoint");
const COMMIT: Operation = Operation::new("end of a checkpoint");

/// A rank's hand in the checkpoints of a folder. Made by [`CheckpointConfig::init`].
///
/// A checkpoint is a folder `NUMBER-step-STEP` that appears whole or not at all. What can be read of it and by whom, see
/// the [module](super).
#[derive(Debug)]
pub struct Checkpoints {
    pub(super) runtime: FsepRuntime,
    pub(super) config: CheckpointConfig,
    files: Arc<dyn CreateFile>,
    pending: Option<Pending>,
}

/// A checkpoint that is being written.
#[derive(Debug)]
struct Pending {
    sequence: u64,
    manifest: Manifest,
    /// Gives what the manifest says of this rank's, as JSON.
    files: Work<Vec<u8>>,
}

/// Writes a checkpoint, keeping all that are there. Collective. Returns the checkpoint's folder.
///
/// # Errors
///
/// As [`Checkpoints::save`].
pub fn save<M: Module, O: CheckpointedOptimizer>(
    folder: impl Into<PathBuf>,
    runtime: &FsepRuntime,
    model: &M,
    optimizer: &O,
    progress: &TrainingProgress,
) -> Result<PathBuf, CheckpointError> {
    let mut checkpoints = CheckpointConfig::new(folder).with_keep(usize::MAX).init(runtime)?;
    let path = checkpoints.save_records(model, optimizer.module_optimizer().to_record(), O::HELD, progress)?;
    Ok(path.unwrap_or_else(|| unreachable!("it is not written in the background")))
}

impl Checkpoints {
    pub(super) fn new(config: CheckpointConfig, runtime: FsepRuntime) -> Self {
        Self { runtime, config, files: Arc::new(Disk), pending: None }
    }

    /// The same with files that may fail.
    #[cfg(test)]
    pub(super) fn with_files(mut self, files: Arc<dyn CreateFile>) -> Self {
        self.files = files;
        self
    }

    /// Saves a checkpoint; a pending one is finished first. Collective: after the same step on all ranks.
    ///
    /// Returns when the checkpoint is there, or, in the background, when all that goes into it was copied to host memory:
    /// then [`Checkpoints::poll`], [`Checkpoints::finish`] or the next checkpoint completes it.
    ///
    /// # Errors
    ///
    /// On all ranks if one has an error: [`CheckpointError::Io`] if a file or folder cannot be written,
    /// [`CheckpointError::Divergence`] if replicated parameters, their optimizer state or the progress differ between
    /// ranks, [`CheckpointError::Unsupported`] for a quantized parameter or an optimizer that does not work element by
    /// element, [`CheckpointError::Peer`] on ranks that have no error themselves; [`CheckpointError::Comm`] if a rank is
    /// lost. Earlier checkpoints stay as they are.
    pub fn save<M: Module, O: CheckpointedOptimizer>(
        &mut self,
        model: &M,
        optimizer: &O,
        progress: &TrainingProgress,
    ) -> Result<(), CheckpointError> {
        self.save_records(model, optimizer.module_optimizer().to_record(), O::HELD, progress).map(drop)
    }

    /// As [`Checkpoints::save`], of the record of an optimizer that holds so much of its state. Returns the checkpoint's folder if it is complete.
    pub(crate) fn save_records<M: Module>(
        &mut self,
        model: &M,
        optimizer: OptimizerRecord,
        held: HeldState,
        progress: &TrainingProgress,
    ) -> Result<Option<PathBuf>, CheckpointError> {
        self.finish()?;
        self.start(snapshot(&self.runtime, model, optimizer, held), progress)?;
        if self.config.background { Ok(None) } else { self.finish() }
    }

    /// Completes a pending checkpoint if all ranks have written their files. Collective. Returns its folder if this
    /// completed it.
    ///
    /// # Errors
    ///
    /// As [`Checkpoints::save`].
    pub fn poll(&mut self) -> Result<Option<PathBuf>, CheckpointError> {
        let Some(pending) = &mut self.pending else { return Ok(None) };
        match pending.files.is_done_everywhere(self.runtime.comm(), WRITE, Duration::ZERO)? {
            true => self.finish(),
            false => Ok(None),
        }
    }

    /// Waits for a pending checkpoint and completes it. Collective. Returns its folder if there was one.
    ///
    /// # Errors
    ///
    /// As [`Checkpoints::save`].
    pub fn finish(&mut self) -> Result<Option<PathBuf>, CheckpointError> {
        let Some(Pending { sequence, manifest, files }) = self.pending.take() else { return Ok(None) };
        let step = manifest.step;
        let result = self.complete(sequence, manifest, files);
        if result.is_err() {
            self.discard(sequence, step);
        }
        result.map(Some)
    }

    /// Makes the folder, compares what has to be equal, and starts to write.
    fn start(
        &mut self,
        snapshot: Result<Vec<SavedParam>, CheckpointError>,
        progress: &TrainingProgress,
    ) -> Result<(), CheckpointError> {
        let (comm, step) = (self.runtime.comm(), progress.step);
        let (rank, folder) = (comm.rank(), self.config.folder.clone());
        let (experts, replicas) = (self.runtime.groups().experts(), self.runtime.groups().replicas());
        let ranks = experts.size();
        let layouts = self.layouts()?;
        let begun = snapshot.and_then(|params| {
            let entries = params.iter().map(|saved| entry(&layouts, saved)).collect();
            let manifest = Manifest::new([replicas.size(), ranks], progress, entries);
            let digest = digest(&to_json(&manifest.parameters)?);
            let sequence = if rank == 0 { folder::begin(&folder, step)? } else { 0 };
            Ok((params, manifest, digest, sequence))
        });
        let (params, manifest, digest, sequence) = all_or_none(comm, START, begun)?;
        let sequence = all_gather_u64(comm, START, &[sequence])?[0];
        let whole = check_equal(comm, digest, &params, progress)
            .and_then(|()| check_shards(&self.runtime, &params))
            .and_then(|()| gather_states(&self.runtime, params));
        let params = whole.inspect_err(|_| self.discard(sequence, step))?;
        let (replicated, experts) = files_of(params, progress);
        let (files, partial) = (self.files.clone(), folder::partial(&folder, sequence, step));
        let is_saved_by_another = replicas.rank() > 0;
        let files = Work::start(move || {
            let mut written = Vec::new();
            if is_saved_by_another {
                return to_json(&written);
            }
            if rank == 0 {
                written.push(write_tensors(files.as_ref(), &partial, REPLICATED, replicated)?);
            }
            written.push(write_tensors(files.as_ref(), &partial, &experts_file(rank, ranks), experts)?);
            folder::sync_folder(&partial)?;
            to_json(&written)
        });
        self.pending = Some(Pending { sequence, manifest, files });
        Ok(())
    }

    /// The layout of each layer in each group: the expert of each slot of each rank. `[layers, W, C]`
    fn layouts(&self) -> Result<Vec<Vec<Vec<u32>>>, CheckpointError> {
        let replicas = self.runtime.groups().replicas();
        let layouts: Vec<_> = (0..self.runtime.num_layers()).map(|layer| self.runtime.layout(layer)).collect();
        let ours: Vec<u32> = layouts.iter().flat_map(|layout| layout.as_slice().iter().copied()).collect();
        let mut all = vec![0; ours.len() * replicas.size()];
        replicas.all_gather(START, bytemuck::cast_slice(&ours), bytemuck::cast_slice_mut(&mut all))?;
        let mut rows = vec![Vec::new(); layouts.len()];
        let mut rest = all.as_slice();
        for _ in 0..replicas.size() {
            for (layout, rows) in layouts.iter().zip(&mut rows) {
                let (slots, after) = rest.split_at(layout.as_slice().len());
                rows.extend(slots.chunks_exact(layout.slots_per_rank()).map(<[u32]>::to_vec));
                rest = after;
            }
        }
        Ok(rows)
    }

    /// Waits for the files of all ranks; then rank 0 writes the manifest and gives the checkpoint its name.
    fn complete(
        &self,
        sequence: u64,
        mut manifest: Manifest,
        files: Work<Vec<u8>>,
    ) -> Result<PathBuf, CheckpointError> {
        let comm = self.runtime.comm();
        // Rank 0's are the replicated parameters' file and its own, the others' follow.
        let all = gather(comm, WRITE, &files.finish(comm, WRITE)?)?;
        let rank = comm.rank();
        let (folder, keep, step) = (self.config.folder.clone(), self.config.keep, manifest.step);
        let output = self.files.clone();
        let committed = Work::start(move || {
            if rank != 0 {
                return Ok(folder.join(folder::checkpoint_name(sequence, step)));
            }
            let partial = folder::partial(&folder, sequence, step);
            for files in all {
                let files: Vec<FileEntry> = serde_json::from_slice(&files).map_err(unwritable)?;
                manifest.files.extend(files);
            }
            for file in &manifest.files {
                let path = partial.join(&file.name);
                let found = fs::metadata(&path).map_err(|error| CheckpointError::Io {
                    action: "find",
                    path: path.clone(),
                    reason: format!("{error}; is the folder on a file system that all ranks share?"),
                })?;
                check_len(&path, found.len(), file.bytes)?;
            }
            let (bytes, sum) = manifest.to_bytes()?;
            write_bytes(output.as_ref(), &partial.join(MANIFEST), &bytes)?;
            write_bytes(output.as_ref(), &partial.join(MANIFEST_SUM), &sum)?;
            let path = folder::commit(&folder, sequence, step)?;
            folder::retain(&folder, keep)?;
            Ok(path)
        });
        committed.finish(comm, COMMIT)
    }

    /// Removes what was written of a checkpoint that failed.
    fn discard(&self, sequence: u64, step: u64) {
        if self.runtime.rank() == 0 {
            folder::discard(&self.config.folder, sequence, step);
        }
    }
}

/// What the manifest says of a parameter.
fn entry(layouts: &[Vec<Vec<u32>>], SavedParam { param, state, parts, .. }: &SavedParam) -> ParameterEntry {
    let experts = param.experts.map(|info| ExpertsEntry { info, layout: layouts[info.layer].clone() });
    let fields = state.tensors.iter().map(|(field, tensor)| {
        let shape = if parts.is_some() { &param.value_shape } else { &tensor.shape };
        (field.clone(), StateEntry { dtype: tensor.dtype, shape: shape.clone() })
    });
    ParameterEntry {
        path: param.path.clone(),
        name: param.name.clone(),
        dtype: param.dtype,
        shape: param.shape.clone(),
        experts,
        state: fields.collect(),
        scalars: state.scalars.keys().cloned().collect(),
    }
}

type NamedTensors = Vec<(String, HostTensor)>;

/// What goes into the file of the replicated parameters, and into that of the rank's experts. Scalars of the optimizer's
/// state are equal on all ranks, those of experts, too.
fn files_of(params: Vec<SavedParam>, progress: &TrainingProgress) -> (NamedTensors, NamedTensors) {
    let (mut replicated, mut sharded) = (Vec::new(), Vec::new());
    for SavedParam { param, value, state, .. } in params {
        let path = &param.path;
        for (field, scalar) in state.scalars {
            replicated.push((scalar_name(path, &field), HostTensor::from_scalar(scalar)));
        }
        let file = if param.experts.is_some() { &mut sharded } else { &mut replicated };
        file.push((param_name(path), value));
        file.extend(state.tensors.into_iter().map(|(field, tensor)| (state_name(path, &field), tensor)));
    }
    for (name, bytes) in &progress.records {
        replicated.push((record_name(name), HostTensor::from_bytes(bytes.clone())));
    }
    (replicated, sharded)
}

/// Checks that all ranks are about to save the same checkpoint. `parameters` is the digest of what the manifest says of them.
fn check_equal(
    group: &dyn Communicator,
    parameters: u64,
    params: &[SavedParam],
    progress: &TrainingProgress,
) -> Result<(), CheckpointError> {
    // Before values are compared: there have to be equally many.
    let facts = [
        ("the step", progress.step),
        ("the epoch", progress.epoch),
        ("the iteration", progress.iteration),
        (
            "the number of parameters whose optimizer state is cut",
            params.iter().filter(|saved| saved.parts.is_some()).count() as u64,
        ),
        ("the parameters' names, shapes or optimizer state, or the layouts", parameters),
    ];
    if let Some(difference) = agree(group, START, &facts)? {
        return Err(differ(difference, "all ranks have to save the same model after the same step"));
    }
    let mut values = Vec::new();
    for SavedParam { param, value, state, parts } in params {
        for (field, &scalar) in &state.scalars {
            values.push((scalar_name(&param.path, field), digest(&HostTensor::from_scalar(scalar).bytes)));
        }
        // Running statistics are of what each rank has seen: rank 0 writes its own.
        if param.experts.is_none() && !param.is_running_statistic {
            values.push((param_name(&param.path), digest(&value.bytes)));
            // Where a state is cut, nobody else has this part of it.
            let tensors = state.tensors.iter().filter(|_| parts.is_none());
            values.extend(tensors.map(|(field, tensor)| (state_name(&param.path, field), digest(&tensor.bytes))));
        }
    }
    agree(group, START, &values)?.map_or(Ok(()), |difference| Err(differ(difference, TRAINED_APART)))
}

/// Checks that ranks that have the same shards have the same values: those of the first group are saved.
fn check_shards(runtime: &FsepRuntime, params: &[SavedParam]) -> Result<(), CheckpointError> {
    let replicas = runtime.groups().replicas();
    if replicas.size() == 1 {
        return Ok(());
    }
    let mut values = Vec::new();
    for SavedParam { param, value, state, parts } in params.iter().filter(|saved| saved.param.experts.is_some()) {
        values.push((param_name(&param.path), digest(&value.bytes)));
        // Of a state that is cut, each has another part.
        let tensors = state.tensors.iter().filter(|_| parts.is_none());
        values.extend(tensors.map(|(field, tensor)| (state_name(&param.path, field), digest(&tensor.bytes))));
    }
    // Names of ranks are the world's in messages.
    let checked = match agree(replicas.as_ref(), START, &values)? {
        None => Ok(()),
        Some(difference) => {
            let rank = replicas.world_rank(difference.rank);
            Err(differ(Difference { rank, ..difference }, TRAINED_APART))
        }
    };
    all_or_none(runtime.comm(), START, checked)
}

fn differ(Difference { field, rank, .. }: Difference, hint: &'static str) -> CheckpointError {
    CheckpointError::Divergence { what: field, rank, hint }
}

const TRAINED_APART: &str = "the ranks train different models, and this checkpoint would hide it: give all of them the same \
                             values once, before the first step (`broadcast_parameters`), and average the gradients of \
                             each step (`sync_gradients`)";
