use std::path::Path;

use super::CliError;

/// Writes a file so that it is there whole or not at all.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> Result<(), CliError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, content).map_err(CliError::file(path))?;
    std::fs::rename(&partial, path).map_err(CliError::file(path))
}
