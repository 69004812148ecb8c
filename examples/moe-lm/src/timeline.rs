use std::path::{Path, PathBuf};

use burn_fsep::{
    FsepError, FsepRuntime, Timeline,
    train::{StepContext, TrainingCallback},
};

use crate::{MoeLmError, files::write_whole};

/// How many steps are recorded, the last ones.
const STEPS: usize = 3;

/// Records the last steps and writes them to the rank's file.
pub(crate) struct TimelineWriter {
    timeline: Timeline,
    path: PathBuf,
    rank: usize,
    /// Steps that are done before training begins.
    done: usize,
    steps: usize,
}

impl TimelineWriter {
    pub fn new(timeline: Timeline, file: &Path, rank: usize, done: u64, steps: usize) -> Self {
        Self { timeline, path: rank_file(file, rank), rank, done: done as usize, steps }
    }

    fn write(&self) -> Result<(), MoeLmError> {
        write_whole(&self.path, self.timeline.chrome_trace(self.rank)?.as_bytes())
    }
}

impl TrainingCallback for TimelineWriter {
    fn on_train_start(&mut self, _: &FsepRuntime) -> Result<(), FsepError> {
        self.timeline.set_recording(self.done + STEPS >= self.steps);
        Ok(())
    }

    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        // Validation is not of interest.
        self.timeline.set_recording((self.steps.saturating_sub(STEPS)..self.steps).contains(&context.iteration));
        Ok(())
    }

    fn on_train_end(&mut self, _: &FsepRuntime) -> Result<(), FsepError> {
        self.write().map_err(|error| FsepError::Callback(error.to_string()))
    }
}

/// `trace.json` becomes `trace.rank0.json`.
fn rank_file(file: &Path, rank: usize) -> PathBuf {
    let extension = file.extension().map(|extension| format!(".{}", extension.display())).unwrap_or_default();
    file.with_extension(format!("rank{rank}{extension}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_a_file() {
        for (file, expected) in [("a/trace.json", "a/trace.rank3.json"), ("trace", "trace.rank3")] {
            assert_eq!(rank_file(Path::new(file), 3), Path::new(expected));
        }
    }
}
