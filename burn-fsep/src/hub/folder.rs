//! The files of a model folder, and the index that names them.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use super::{HubError, header::TensorFile, json::read_object};

pub(super) const CONFIG: &str = "config.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The largest index: that of DeepSeek-V3 has 9 MB.
const MAX_INDEX: u64 = 256 << 20;

/// Opens all files with weights of a folder, in the order of their names.
///
/// # Errors
///
/// [`HubError::NoWeights`], [`HubError::UnsafePath`], [`HubError::Damaged`] also if index and files do not name the same
/// tensors, [`HubError::Io`].
pub(super) fn open_files(folder: &Path) -> Result<Vec<TensorFile>, HubError> {
    let (weights, index) = (folder.join(WEIGHTS), folder.join(INDEX));
    if !exists(&index) {
        if !exists(&weights) {
            return Err(HubError::NoWeights { folder: folder.into(), hint: hint(folder) });
        }
        stays_inside(folder, &weights, WEIGHTS)?;
        return Ok(vec![TensorFile::open(&weights)?]);
    }
    let map = read_index(folder, &index)?;
    let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in &map {
        files.entry(file).or_default().push(tensor);
    }
    if exists(&weights) && !files.contains_key(WEIGHTS) {
        let reason = format!("it does not name {WEIGHTS}, which is there, too: remove what is not of this model");
        return Err(HubError::damaged(&index, reason));
    }
    if let Some((name, tensors)) = files.iter().find(|(name, _)| !exists(&folder.join(name))) {
        return Err(HubError::damaged_tensor(&index, tensors[0], format!("is to be in {name}, which is missing")));
    }
    let mut opened = Vec::with_capacity(files.len());
    for (name, tensors) in files {
        let path = folder.join(name);
        stays_inside(folder, &index, name)?;
        let file = TensorFile::open(&path)?;
        if let Some(tensor) = tensors.iter().find(|tensor| !file.tensors.iter().any(|(name, _)| name == *tensor)) {
            return Err(HubError::damaged_tensor(
                &path,
                tensor,
                format!("is missing, but {INDEX} says that it is here"),
            ));
        }
        for (tensor, _) in &file.tensors {
            match map.get(tensor) {
                Some(said) if said == name => {}
                Some(said) => {
                    let reason = format!("is here, but {INDEX} says that it is in {said}");
                    return Err(HubError::damaged_tensor(&path, tensor, reason));
                }
                None => return Err(HubError::damaged_tensor(&path, tensor, format!("is here, but not in {INDEX}"))),
            }
        }
        opened.push(file);
    }
    Ok(opened)
}

/// Whether there is anything of this name, also a link that leads nowhere.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Which file each tensor is in.
fn read_index(folder: &Path, path: &Path) -> Result<BTreeMap<String, String>, HubError> {
    stays_inside(folder, path, INDEX)?;
    let mut index = read_object(path, MAX_INDEX)?;
    let map = index.remove("weight_map").ok_or_else(|| HubError::damaged(path, "it has no `weight_map`"))?;
    let map: BTreeMap<String, String> = serde_json::from_value(map)
        .map_err(|error| HubError::damaged(path, format!("its `weight_map` is no table of file names: {error}")))?;
    if map.is_empty() {
        return Err(HubError::damaged(path, "its `weight_map` is empty"));
    }
    for name in map.values() {
        plain_name(path, name)?;
    }
    Ok(map)
}

/// A name that is one in its own folder.
fn plain_name(index: &Path, name: &str) -> Result<(), HubError> {
    let refuse = |reason: &str| {
        Err(HubError::UnsafePath { file: index.to_path_buf(), name: name.into(), reason: reason.into() })
    };
    let mut components = Path::new(name).components();
    let is_plain =
        matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name);
    if !is_plain || name.contains(['/', '\\', ':', '\0']) {
        return refuse("it is not the plain name of a file beside the index");
    }
    if !name.ends_with(".safetensors") {
        return refuse("it does not end in .safetensors");
    }
    Ok(())
}

/// Refuses a link to a file outside of the folder. Those of the hub's own cache are known: there `snapshots/REVISION/NAME` is
/// a link to `blobs/HASH` beside `snapshots`.
pub(super) fn stays_inside(folder: &Path, named_by: &Path, name: &str) -> Result<(), HubError> {
    let path = folder.join(name);
    let resolve = |path: &Path| path.canonicalize().map_err(HubError::io("find", path));
    let (inside, target): (PathBuf, PathBuf) = (resolve(folder)?, resolve(&path)?);
    let blobs = inside.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent);
    if target.starts_with(&inside) || blobs.is_some_and(|cache| target.parent() == Some(&cache.join("blobs"))) {
        return Ok(());
    }
    let reason = format!("it is a link to {}, out of the folder", target.display());
    Err(HubError::UnsafePath { file: named_by.to_path_buf(), name: name.into(), reason })
}

/// What to do with a folder that has weights of another kind.
fn hint(folder: &Path) -> &'static str {
    if !folder.is_dir() {
        ": there is no such folder"
    } else if exists(&folder.join("pytorch_model.bin")) || exists(&folder.join("pytorch_model.bin.index.json")) {
        ", but weights as pickled Python, which are not read: load them with transformers and `save_pretrained`"
    } else if exists(&folder.join("adapter_model.safetensors")) {
        ", but an adapter: merge it into its model with peft and `save_pretrained`"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let index = Path::new("i.json");
        plain_name(index, "model-00001-of-00002.safetensors").unwrap();
        for name in [
            "../model.safetensors",
            "/etc/model.safetensors",
            "a/b.safetensors",
            "a\\b.safetensors",
            "C:b.safetensors",
            ".",
            "..",
            "",
            "./model.safetensors",
            "model.safetensors/",
            "a\0.safetensors",
            "model.bin",
        ] {
            let error = plain_name(index, name).unwrap_err();
            assert!(matches!(error, HubError::UnsafePath { .. }), "{name}: {error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_inside_or_are_those_of_the_cache() {
        use std::os::unix::fs::symlink;

        let temp = tempfile::tempdir().unwrap();
        let (snapshot, blobs) = (temp.path().join("snapshots/main"), temp.path().join("blobs"));
        for folder in [&snapshot, &blobs] {
            fs::create_dir_all(folder).unwrap();
        }
        for file in [blobs.join("abc"), temp.path().join("secret"), snapshot.join("here")] {
            fs::write(file, "x").unwrap();
        }
        symlink("../../blobs/abc", snapshot.join("cached")).unwrap();
        symlink("here", snapshot.join("inside")).unwrap();
        symlink("../../secret", snapshot.join("outside")).unwrap();
        let check = |name: &str| stays_inside(&snapshot, &snapshot.join(INDEX), name);
        for name in ["here", "inside", "cached"] {
            check(name).unwrap();
        }
        assert!(matches!(check("outside"), Err(HubError::UnsafePath { .. })));
    }
}
