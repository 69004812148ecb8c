use std::{
    fmt,
    fs::File,
    io::{self, Write},
    path::Path,
};

/// Creates the files of a checkpoint; tests put one in its place whose disk is full.
pub(super) trait CreateFile: Send + Sync + fmt::Debug {
    fn create(&self, path: &Path) -> io::Result<Box<dyn OutputFile>>;
}

/// A file being written.
pub(super) trait OutputFile: Write + Send {
    /// Waits until the disk has everything.
    fn sync(&mut self) -> io::Result<()>;
}

/// Files on disk.
#[derive(Debug)]
pub(super) struct Disk;

impl CreateFile for Disk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn OutputFile>> {
        Ok(Box::new(File::create_new(path)?))
    }
}

impl OutputFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}
