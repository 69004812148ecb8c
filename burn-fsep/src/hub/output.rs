//! A folder that appears whole or not at all.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use super::{
    HubError,
    folder::{CONFIG, stays_inside},
    json::Object,
};

/// Files beside the weights that belong to the model, by how their names begin and end.
const COMPANIONS: [(&str, &str); 16] = [
    ("generation_config", ".json"),
    ("tokenizer", ""),
    ("special_tokens_map", ".json"),
    ("added_tokens", ".json"),
    ("vocab", ""),
    ("merges", ".txt"),
    ("chat_template", ""),
    ("spiece", ".model"),
    ("sentencepiece", ".model"),
    ("", ".tiktoken"),
    ("preprocessor_config", ".json"),
    // Code that `auto_map` of config.json names.
    ("", ".py"),
    ("LICENSE", ""),
    ("NOTICE", ""),
    ("USE_POLICY", ""),
    ("README", ".md"),
];

/// The folder that is written to.
#[derive(Debug, Clone)]
pub(super) struct Output {
    target: PathBuf,
    pub partial: PathBuf,
}

impl Output {
    pub fn new(target: &Path) -> Result<Self, HubError> {
        let Some(name) = target.file_name() else {
            return Err(HubError::Option(format!("{} is no name for a folder", target.display())));
        };
        let partial = target.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        Ok(Self { target: target.to_path_buf(), partial })
    }

    /// Makes the folder, after removing what a writer left that died. One rank's.
    ///
    /// # Errors
    ///
    /// [`HubError::Exists`], [`HubError::Io`].
    pub fn begin(&self) -> Result<(), HubError> {
        let Self { target, partial } = self;
        let is_taken = match fs::read_dir(target) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) => error.kind() != ErrorKind::NotFound,
        };
        if is_taken {
            return Err(HubError::Exists { path: target.clone() });
        }
        if partial.symlink_metadata().is_ok() {
            fs::remove_dir_all(partial).map_err(HubError::io("delete", partial))?;
        }
        fs::create_dir_all(partial).map_err(HubError::io("create", partial))
    }

    /// Writes a small file and waits until the disk has it.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), HubError> {
        let path = self.partial.join(name);
        let mut file = File::create_new(&path).map_err(HubError::io("create", &path))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(HubError::io("write", &path))
    }

    /// Writes JSON as transformers does.
    pub fn write_json(&self, name: &str, object: &Object) -> Result<(), HubError> {
        let mut bytes = serde_json::to_vec_pretty(object).map_err(|error| HubError::Option(error.to_string()))?;
        bytes.push(b'\n');
        self.write(name, &bytes)
    }

    /// Copies what belongs to a model beside weights and `config.json`.
    pub fn copy_companions(&self, from: &Path) -> Result<(), HubError> {
        let failed = HubError::io("list", from);
        for entry in fs::read_dir(from).map_err(&failed)? {
            let Ok(name) = entry.map_err(&failed)?.file_name().into_string() else { continue };
            let is_companion = COMPANIONS.iter().any(|(begin, end)| name.starts_with(begin) && name.ends_with(end));
            if is_companion && name != CONFIG && from.join(&name).is_file() {
                stays_inside(from, &from.join(&name), &name)?;
                self.copy(from, &name)?;
            }
        }
        Ok(())
    }

    /// Copies a file as it is.
    pub fn copy(&self, from: &Path, name: &str) -> Result<(), HubError> {
        let (from, to) = (from.join(name), self.partial.join(name));
        fs::copy(&from, &to).map_err(HubError::io("copy", &from))?;
        File::open(&to).and_then(|file| file.sync_all()).map_err(HubError::io("write", &to))
    }

    /// Checks that all ranks' files are there, and gives the folder its name.
    pub fn commit(&self, files: &[(&str, u64)]) -> Result<(), HubError> {
        let Self { target, partial } = self;
        for (name, len) in files {
            let path = partial.join(name);
            let reason = match fs::metadata(&path) {
                Ok(found) if found.len() == *len => continue,
                Ok(found) => format!("it has {} bytes instead of {len}", found.len()),
                Err(error) => format!("{error}; is the folder on a file system that all ranks share?"),
            };
            return Err(HubError::Io { action: "find", path, reason });
        }
        sync_folder(partial)?;
        // An empty folder of this name makes room.
        let _ = fs::remove_dir(target);
        fs::rename(partial, target).map_err(HubError::io("rename", partial))?;
        sync_folder(target.parent().unwrap_or(Path::new("")))
    }

    /// Removes what was written.
    pub fn discard(&self) {
        // If it cannot be deleted now, it goes before the next model of this name.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// Waits until the disk has the folder's list of files.
fn sync_folder(folder: &Path) -> Result<(), HubError> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    // Elsewhere a folder cannot be opened, and needs no sync of its own.
    if cfg!(unix) {
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(HubError::io("write the folder", folder))?;
    }
    Ok(())
}
