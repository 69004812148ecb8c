use std::path::Path;

use crate::MoeLmError;

/// Writes a file so that it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> Result<(), MoeLmError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let written = std::fs::write(&partial, content).and_then(|()| std::fs::rename(&partial, path));
    written.map_err(|error| {
        // Often it is not there.
        let _ = std::fs::remove_file(&partial);
        MoeLmError::file(path)(error)
    })
}
