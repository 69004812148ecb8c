use std::path::Path;

use serde::Serialize;

use crate::MoeHfError;

/// Writes a file so that it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<(), MoeHfError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
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
    Ok(())
}
