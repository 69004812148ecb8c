use std::{
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use super::CheckpointError;

/// Folders that are being written, or were when their writer died.
const PARTIAL: &str = ".partial-";
/// Folders that are being deleted, or were when their deleter died.
const DELETED: &str = ".deleted-";

/// The name of a checkpoint: the order in which it was written, then its step.
///
/// Order alone decides what is newest, so that a run started anew in the same folder does not lose its checkpoints to
/// the greater steps of an older run.
pub(super) fn checkpoint_name(sequence: u64, step: u64) -> String {
    format!("{sequence:06}-step-{step:08}")
}

fn sequence_of(name: &str) -> Option<u64> {
    let (sequence, step) = name.split_once("-step-")?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number(sequence) && is_number(step) { sequence.parse().ok() } else { None }
}

/// The checkpoints in a folder, oldest first, with their order; none if there is no such folder.
pub(super) fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut found: Vec<_> =
        entries(folder)?.into_iter().filter_map(|(name, path)| sequence_of(&name).map(|s| (s, path))).collect();
    found.sort();
    Ok(found)
}

fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, CheckpointError> {
    let failed = CheckpointError::io("list", folder);
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(&failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(&failed)?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// Makes the folder in which a checkpoint is written, after removing what dead writers left; returns the checkpoint's
/// order.
pub(super) fn begin(folder: &Path, step: u64) -> Result<u64, CheckpointError> {
    create(folder)?;
    let left = entries(folder)?;
    for (_, path) in left.iter().filter(|(name, _)| name.starts_with(DELETED)) {
        // Tried again before the next checkpoint.
        let _ = fs::remove_dir_all(path);
    }
    for (_, path) in left.iter().filter(|(name, _)| name.starts_with(PARTIAL)) {
        let _ = delete(path);
    }
    let sequence = checkpoints(folder)?.last().map_or(1, |(newest, _)| newest.saturating_add(1));
    let partial = partial(folder, sequence, step);
    fs::create_dir(&partial).map_err(CheckpointError::io("create", &partial))?;
    Ok(sequence)
}

/// Makes a folder that stays after a power failure, with those that it is in.
fn create(folder: &Path) -> Result<(), CheckpointError> {
    let is_new = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    let new: Vec<&Path> = folder.ancestors().take_while(is_new).collect();
    fs::create_dir_all(folder).map_err(CheckpointError::io("create", folder))?;
    new.into_iter().filter_map(Path::parent).try_for_each(sync_folder)
}

/// Where a checkpoint is written.
pub(super) fn partial(folder: &Path, sequence: u64, step: u64) -> PathBuf {
    folder.join(format!("{PARTIAL}{}", checkpoint_name(sequence, step)))
}

/// Gives a checkpoint that is written completely its name.
pub(super) fn commit(folder: &Path, sequence: u64, step: u64) -> Result<PathBuf, CheckpointError> {
    let partial = partial(folder, sequence, step);
    let path = folder.join(checkpoint_name(sequence, step));
    sync_folder(&partial)?;
    fs::rename(&partial, &path).map_err(CheckpointError::io("rename", &partial))?;
    sync_folder(folder)?;
    Ok(path)
}

/// Deletes all but the `keep` newest checkpoints.
pub(super) fn retain(folder: &Path, keep: usize) -> Result<(), CheckpointError> {
    let all = checkpoints(folder)?;
    all[..all.len().saturating_sub(keep)].iter().try_for_each(|(_, path)| delete(path))
}

/// Deletes what was written of a checkpoint, unless it has its name already.
pub(super) fn discard(folder: &Path, sequence: u64, step: u64) {
    // If it cannot be deleted now, it goes before the next checkpoint.
    let _ = delete(&partial(folder, sequence, step));
}

/// Deletes a checkpoint, or what was written of one. It is renamed first: none is ever there in part, also if its last file
/// is being written at this moment and it is about to get its name.
fn delete(path: &Path) -> Result<(), CheckpointError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.trim_start_matches(PARTIAL);
    // One of this name may be left that could not be deleted.
    let mut names = (0u32..).map(|i| path.with_file_name(format!("{DELETED}{name}.{i}")));
    let deleted = names.find(|deleted| !deleted.exists()).expect("there are more numbers than folders");
    fs::rename(path, &deleted).map_err(CheckpointError::io("delete", path))?;
    // What cannot be deleted now (files that are open, on a network file system) goes before the next checkpoint.
    let _ = fs::remove_dir_all(&deleted);
    Ok(())
}

/// Waits until the disk has the folder's list of files.
pub(super) fn sync_folder(folder: &Path) -> Result<(), CheckpointError> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    // Elsewhere a folder cannot be opened, and needs no sync of its own.
    if cfg!(unix) {
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(CheckpointError::io("write the folder", folder))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let all = checkpoints(folder).unwrap();
        all.iter().map(|(_, path)| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn the_newest_is_the_one_written_last() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("runs/checkpoints");
        assert!(names(&folder).is_empty());
        for step in [900, 10, 20] {
            let sequence = begin(&folder, step).unwrap();
            assert!(!folder.join(checkpoint_name(sequence, step)).exists());
            commit(&folder, sequence, step).unwrap();
            retain(&folder, 2).unwrap();
        }
        assert_eq!(names(&folder), ["000002-step-00000010", "000003-step-00000020"]);
        assert_eq!(entries(&folder).unwrap().len(), 2, "nothing is left of what was deleted");
    }

    /// A rank that hears of a loss gives up a checkpoint, while its own thread may be about to complete it.
    #[test]
    fn a_checkpoint_that_is_given_up_as_it_gets_its_name_is_whole_or_not_there() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path();
        let mut outcomes = std::collections::BTreeSet::new();
        for round in 0..400 {
            let sequence = begin(folder, 1).unwrap();
            let files: Vec<_> = (0..12).map(|file| file.to_string()).collect();
            files.iter().for_each(|file| fs::write(partial(folder, sequence, 1).join(file), file).unwrap());
            // One of them is late by more and more, to meet the other in the midst of it, and at last by so much that it
            // comes second whatever the machine is busy with.
            let delay = |late: bool| match round {
                398.. if late => std::thread::sleep(std::time::Duration::from_secs(1)),
                _ => (0..if late { round * 100 } else { 0 }).for_each(|_| std::hint::spin_loop()),
            };
            let committed = std::thread::scope(|scope| {
                let committing = scope.spawn(|| {
                    delay(round % 2 == 0);
                    commit(folder, sequence, 1)
                });
                delay(round % 2 == 1);
                discard(folder, sequence, 1);
                committing.join().unwrap().is_ok()
            });
            let path = folder.join(checkpoint_name(sequence, 1));
            let left = fs::read_dir(&path).map_or(0, Iterator::count);
            assert_eq!(left, if committed { files.len() } else { 0 }, "round {round}");
            outcomes.insert(committed);
            let _ = fs::remove_dir_all(path);
        }
        assert_eq!(outcomes.len(), 2, "each was first once");
    }

    #[test]
    fn what_a_dead_writer_left_is_no_checkpoint_and_goes() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path();
        begin(folder, 5).unwrap();
        fs::create_dir(folder.join(".deleted-000001-step-00000003")).unwrap();
        fs::create_dir(folder.join("notes")).unwrap();
        assert!(names(folder).is_empty());
        let sequence = begin(folder, 6).unwrap();
        commit(folder, sequence, 6).unwrap();
        let mut left: Vec<_> = entries(folder).unwrap().into_iter().map(|(name, _)| name).collect();
        left.sort();
        assert_eq!(left, ["000001-step-00000006", "notes"]);
    }
}
