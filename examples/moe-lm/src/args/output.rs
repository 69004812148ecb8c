use std::path::{Path, PathBuf};

use clap::Args;

use super::command::{check_positive, refuse};
use crate::MoeLmError;

/// Files that are written, and checkpoints.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Output and checkpoints")]
pub struct OutputArgs {
    /// Folder for metrics (metrics.jsonl), curves (curves.html) and checkpoints; on several machines a shared one.
    #[arg(long, default_value = "out/moe-lm")]
    pub out: PathBuf,
    /// Also write the summary to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,
    /// Also write the routing counts of all steps to this file, for `fsep-planner replay`.
    #[arg(long, value_name = "FILE")]
    pub record_trace: Option<PathBuf>,
    /// Also write what ran when in the last three steps, for Perfetto or Chrome: FILE.json becomes FILE.rank0.json and so on.
    #[arg(long, value_name = "FILE")]
    pub timeline: Option<PathBuf>,
    /// Save a checkpoint to OUT/checkpoints every so many steps, and when the job is told to stop (SIGTERM): it then ends with
    /// exit code 143, as what SIGTERM ends.
    #[arg(long, value_name = "STEPS")]
    pub checkpoint_every: Option<u64>,
    /// Checkpoints to keep.
    #[arg(long, default_value_t = 2)]
    pub keep: usize,
    /// Go on from a checkpoint, also with another number of ranks: `auto` for the newest whole one in OUT/checkpoints, or
    /// from the start if there is none; or a checkpoint's folder.
    #[arg(long, value_name = "auto|PATH")]
    pub resume: Option<PathBuf>,
    /// Bytes of text to generate at the end.
    #[arg(long, value_name = "BYTES", default_value_t = 240)]
    pub sample: usize,
}

impl OutputArgs {
    pub(super) fn check(&self) -> Result<(), MoeLmError> {
        check_positive([("--checkpoint-every", self.checkpoint_every.unwrap_or(1)), ("--keep", self.keep as u64)])?;
        for (name, file) in
            [("--summary", &self.summary), ("--record-trace", &self.record_trace), ("--timeline", &self.timeline)]
        {
            let Some(file) = file else { continue };
            let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
            if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
                return refuse(format!("{name}: there is no folder {} to write to", folder.display()));
            }
            if file.file_name().is_none() || file.is_dir() {
                return refuse(format!("{name}: {} is a folder, not a file", file.display()));
            }
        }
        if self.out.exists() && !self.out.is_dir() {
            return refuse(format!("--out: {} is a file, not a folder", self.out.display()));
        }
        if self.resume.as_deref().is_some_and(|path| path != Path::new("auto") && !path.is_dir()) {
            let path = self.resume.as_deref().unwrap_or(Path::new("")).display();
            return refuse(format!("--resume: there is no checkpoint folder {path}, and no manifest.json in it"));
        }
        Ok(())
    }
}
