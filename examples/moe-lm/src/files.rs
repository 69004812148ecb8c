use std::path::Path;

use crate::MoeLmError;

/// Writes a file so that it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<(), MoeLmError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, content).map_err(MoeLmError::file(path))?;
    std::fs::rename(&partial, path).map_err(MoeLmError::file(path))
}
