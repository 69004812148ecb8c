use std::{
    fs::{self, Metadata},
    io,
    path::Path,
};

use super::HubError;

/// What the system says of a file, which is one: a named pipe would be waited for, a device read without end.
///
/// # Errors
///
/// [`HubError::Io`], also if it is missing.
pub(super) fn regular_file(path: &Path) -> Result<Metadata, HubError> {
    let failed = HubError::io("read", path);
    let found = fs::metadata(path).map_err(&failed)?;
    if found.is_file() { Ok(found) } else { Err(failed(io::Error::other("it is no regular file"))) }
}
