use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use burn::{module::Module, tensor::TensorData};
use safetensors::Dtype;

use super::{
    CheckpointError,
    all_or_none::{Work, all_or_none},
    content::{Entry, Part, check_files},
    folder::sync_folder,
    manifest::{Manifest, REPLICATED, experts_file, param_name},
    model::{ModelParam, load_values, model_params},
    reshard::{Overlap, Sharding},
    tensors::{TensorFile, header},
};
use crate::{FsepRuntime, comm::Operation};

const IMPORT: Operation = Operation::new("import of an unsharded model");

/// Writes a checkpoint's model, without optimizer state, as one safetensors file. Needs no ranks and no model.
///
/// Names are those of the dense model: paths of fields, without variants of enums. Experts are whole and stand where
/// [`DenseMoE`](crate::moe::DenseMoE) has them: for a layer at `LAYER`, `LAYER.weight` `[E, P]`, of which each row holds
/// gate `[F, D]`, up `[F, D]` and down `[D, F]`, and `LAYER.router.weight` `[D, E]`. An existing file is replaced.
///
/// # Errors
///
/// As [`verify`](super::verify); [`CheckpointError::Unsupported`] if two parameters have one name (in variants of an
/// enum); [`CheckpointError::Io`] if the file cannot be written.
pub fn export_unsharded(checkpoint: impl AsRef<Path>, file: impl Into<PathBuf>) -> Result<(), CheckpointError> {
    let (checkpoint, target): (_, PathBuf) = (checkpoint.as_ref(), file.into());
    let (manifest, _) = Manifest::read(checkpoint)?;
    check_files(checkpoint, &manifest, |_| true)?;
    let mut partial = target.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = write_unsharded(checkpoint, &manifest, &partial);
    let written = written
        .and_then(|()| fs::rename(&partial, &target).map_err(CheckpointError::io("rename", &partial)))
        .and_then(|()| target.parent().map_or(Ok(()), sync_folder));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

fn write_unsharded(checkpoint: &Path, manifest: &Manifest, partial: &Path) -> Result<(), CheckpointError> {
    let mut table: Vec<(&str, Dtype, Vec<usize>)> = Vec::with_capacity(manifest.parameters.len());
    for entry in &manifest.parameters {
        if table.iter().any(|(name, ..)| *name == entry.name.as_str()) {
            let reason = "another parameter has the same name in the dense model".into();
            return Err(CheckpointError::Unsupported { what: entry.name.clone(), reason });
        }
        let shape = match &entry.experts {
            Some(experts) => Sharding::whole(&experts.info).shape().to_vec(),
            None => entry.shape.clone(),
        };
        table.push((entry.name.as_str(), entry.dtype, shape));
    }
    let slices: Vec<_> = table.iter().map(|(name, dtype, shape)| (*name, *dtype, shape.as_slice())).collect();
    let (head, starts) = header(&slices)?;
    let failed = CheckpointError::io("write", partial);
    let mut output = File::create(partial).map_err(&failed)?;
    output.write_all(&head).map_err(&failed)?;

    let ranks = manifest.world_size;
    let sources = std::iter::once((None, REPLICATED.to_string()))
        .chain((0..ranks).map(|rank| (Some(rank), experts_file(rank, ranks))));
    for (rank, name) in sources {
        let mut source = TensorFile::open(checkpoint.join(name))?;
        for (entry, start) in manifest.parameters.iter().zip(&starts) {
            let overlaps = match (&entry.experts, rank) {
                (None, None) => vec![Overlap { from: 0, to: 0, len: entry.shape.iter().product() }],
                (Some(saved), Some(rank)) => {
                    Sharding::new(&saved.info, ranks).overlaps(rank, &Sharding::whole(&saved.info), 0)
                }
                _ => continue,
            };
            let from = source.expect(&param_name(&entry.path), entry.dtype, &entry.shape)?;
            let size = entry.dtype.bitsize() / 8;
            for overlap in overlaps {
                output.seek(SeekFrom::Start((start + overlap.to * size) as u64)).map_err(&failed)?;
                let end = overlap.from + overlap.len;
                for chunk in (overlap.from..end).step_by(CHUNK) {
                    let mut bytes = vec![0; (end - chunk).min(CHUNK) * size];
                    source.read_at(from + (chunk * size) as u64, &mut bytes)?;
                    output.write_all(&bytes).map_err(&failed)?;
                }
            }
        }
    }
    output.sync_all().map_err(&failed)
}

/// Elements copied at once.
const CHUNK: usize = 1 << 18;

/// Loads an unsharded model: a file that [`export_unsharded`] wrote, or one with the same names. Collective.
///
/// Every rank reads its own part of the experts. A model without FSEP layers, such as one of
/// [`DenseMoE`](crate::moe::DenseMoE), can be loaded, too. Such files have no checksums: what is compared are names,
/// types and shapes.
///
/// # Errors
///
/// On all ranks if one has an error: [`CheckpointError::Damaged`] if it is no whole safetensors file,
/// [`CheckpointError::Model`] if its tensors are not those of the model, [`CheckpointError::Io`],
/// [`CheckpointError::Peer`], [`CheckpointError::Comm`].
pub fn import_unsharded<M: Module>(
    file: impl Into<PathBuf>,
    runtime: &FsepRuntime,
    model: &M,
) -> Result<M, CheckpointError> {
    let path: PathBuf = file.into();
    let comm = runtime.comm();
    let (rank, ranks) = (runtime.groups().experts().rank(), runtime.groups().experts().size());
    let params = all_or_none(comm, IMPORT, model_params(runtime, model))?;
    let reading = {
        let params = params.clone();
        Work::start(move || read_unsharded(&path, &params, rank, ranks))
    };
    let values = reading.finish(comm, IMPORT)?;
    all_or_none(comm, IMPORT, load_values(model, &params, values))
}

fn read_unsharded(
    path: &Path,
    params: &[ModelParam],
    rank: usize,
    ranks: usize,
) -> Result<Vec<TensorData>, CheckpointError> {
    let mut file = TensorFile::open(path)?;
    let unfit = |parameter: &str, reason: String| CheckpointError::Model {
        checkpoint: path.to_path_buf(),
        parameter: parameter.into(),
        reason,
    };
    if let Some(name) = file.names().iter().find(|name| params.iter().all(|param| param.name != **name)) {
        return Err(unfit(name, "is in the file, not in the model".into()));
    }
    let mut values = Vec::with_capacity(params.len());
    for param in params {
        let (saved, overlaps, shape) = match param.experts {
            None => {
                let all = Overlap { from: 0, to: 0, len: param.shape.iter().product() };
                (param.shape.clone(), vec![all], param.shape.clone())
            }
            Some(info) => {
                let (whole, ours) = (Sharding::whole(&info), Sharding::new(&info, ranks));
                (whole.shape().to_vec(), whole.overlaps(0, &ours, rank), ours.shape().to_vec())
            }
        };
        match file.info(&param.name) {
            None => return Err(unfit(&param.name, "is not in the file".into())),
            Some(info) if info.dtype != param.dtype || info.shape != saved => {
                let reason =
                    format!("is {} {:?} in the file, {} {saved:?} in the model", info.dtype, info.shape, param.dtype);
                return Err(unfit(&param.name, reason));
            }
            Some(_) => {}
        }
        let entry = Entry { field: None, name: param.name.clone(), dtype: param.dtype, shape: &saved };
        let mut part = Part::zeros(entry, &shape)?;
        part.fill(&mut file, &saved, &overlaps)?;
        values.push(part.into_data()?.1);
    }
    Ok(values)
}
