use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::MoeHfError;

/// Writes a file so that it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<(), MoeHfError> {
    let partial = partial(path);
    let written = std::fs::write(&partial, content).and_then(|()| std::fs::rename(&partial, path));
    written.map_err(|error| {
        // Often it is not there.
        let _ = std::fs::remove_file(&partial);
        MoeHfError::file(path)(error)
    })
}

/// The same with a value as JSON.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), MoeHfError> {
    let mut text = serde_json::to_vec(value).map_err(|error| MoeHfError::content(path, error))?;
    text.push(b'\n');
    write_whole(path, &text)
}

/// Refuses a file that could not be written when all is computed.
pub(crate) fn check_output(option: &str, file: &Path) -> Result<(), MoeHfError> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return Err(MoeHfError::Option(format!("{option}: there is no folder {} to write to", folder.display())));
    }
    if file.file_name().is_none() || file.is_dir() {
        return Err(MoeHfError::Option(format!("{option}: {} is a folder, not a file", file.display())));
    }
    let partial = partial(file);
    std::fs::File::create(&partial).map_err(MoeHfError::file(file))?;
    // Another process of the job may have been faster.
    let _ = std::fs::remove_file(&partial);
    Ok(())
}

/// The same for a folder, which is made then; those that it lies in are made now.
pub(crate) fn check_output_folder(folder: &Path) -> Result<(), MoeHfError> {
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent).map_err(MoeHfError::file(parent))?;
    }
    if folder.exists() {
        return Ok(());
    }
    std::fs::create_dir(folder).and_then(|()| std::fs::remove_dir(folder)).map_err(MoeHfError::file(folder))
}

/// Where a file is until it is whole.
fn partial(file: &Path) -> PathBuf {
    let mut partial = file.as_os_str().to_owned();
    partial.push(".partial");
    partial.into()
}
