use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use burn::{optim::ModuleOptimizer, train::Interrupter};
use burn_fsep::{
    FsepError, FsepRuntime,
    checkpoint::{CheckpointConfig, Loaded, TrainingProgress, load},
    train::{StepContext, TrainingCallback},
};

use crate::{Args, ModelArgs, MoeLmError, TrainingArgs, model::MoeLm, record::StepRow, train::TrainingData};

/// The note of a checkpoint that says what its training was.
const OPTIONS: &str = "options";

/// Where checkpoints go, if any are saved.
pub(crate) fn checkpoints(args: &Args) -> Option<CheckpointConfig> {
    Some(folder_config(args).with_every(args.output.checkpoint_every?).with_background(true))
}

fn folder_config(args: &Args) -> CheckpointConfig {
    CheckpointConfig::new(args.output.out.join("checkpoints")).with_keep(args.output.keep)
}

/// The progress of a training that begins.
pub(crate) fn beginning(args: &Args, data: &TrainingData) -> TrainingProgress {
    TrainingProgress::default().with_metadata(OPTIONS, options(args, data))
}

/// The checkpoint that the options tell to go on from. Collective.
///
/// # Errors
///
/// [`MoeLmError`] if there is none, it cannot be loaded, it is of another training, or nothing is left to do.
pub(crate) fn resume(
    args: &Args,
    data: &TrainingData,
    runtime: &FsepRuntime,
    model: &MoeLm,
    optimizer: &ModuleOptimizer,
) -> Result<Option<Loaded<MoeLm>>, MoeLmError> {
    let Some(path) = &args.output.resume else { return Ok(None) };
    let loaded = if path == Path::new("auto") {
        let checkpoints = folder_config(args).init(runtime).map_err(FsepError::from)?;
        checkpoints.load_newest_whole(model, optimizer).map_err(FsepError::from)?
    } else {
        Some(load(path, runtime, model, optimizer).map_err(FsepError::from)?)
    };
    let Some(loaded) = loaded else { return Ok(None) };
    let (ours, theirs) = (options(args, data), loaded.progress.metadata.get(OPTIONS));
    if theirs != Some(&ours) {
        return Err(MoeLmError::Option(format!(
            "--resume {}: that training was another one: it had {}, this one has {ours}",
            loaded.path.display(),
            theirs.map_or("no options", String::as_str)
        )));
    }
    // The one epoch is over, with its validation.
    if loaded.progress.epoch > 1 {
        return Err(MoeLmError::Option(format!(
            "--resume {}: that training is done: all {} steps and the validation",
            loaded.path.display(),
            args.training.steps
        )));
    }
    if runtime.rank() == 0 {
        loaded.skipped.iter().for_each(|error| eprintln!("skipped: {error}"));
        eprintln!("going on from step {}: {}", loaded.progress.step, loaded.path.display());
    }
    Ok(Some(loaded))
}

/// What has to stay as it was for a training to go on.
fn options(args: &Args, data: &TrainingData) -> String {
    // Without `..`, so that whoever adds an option decides. Left out are what parameters there are, which is compared when they
    // are loaded, the text's files, of which the text is compared, and the size of the validation, which may change.
    let ModelArgs { layers: _, hidden: _, heads, ffn: _, experts: _, top_k, force_biased, force_shares } = &args.model;
    let TrainingArgs {
        text: _,
        batch,
        context,
        steps,
        valid_batches: _,
        lr,
        clip,
        aux_loss,
        seed,
        mixed_precision,
        dense: _,
    } = &args.training;
    let mut options = format!(
        "--batch {batch} --context {context} --steps {steps} --heads {heads} --top-k {top_k} --lr {lr} --clip {clip} \
         --aux-loss {aux_loss} --seed {seed}"
    );
    if *mixed_precision {
        options += " --mixed-precision";
    }
    if let Some(bias) = force_biased {
        options += &format!(" --force-biased {bias}");
    }
    if let Some(shares) = force_shares {
        options += &format!(" --force-shares {shares:?}");
    }
    options + &format!(" and the text {}", data.digest)
}

/// The rows of `metrics.jsonl` up to the step that training goes on from.
///
/// # Errors
///
/// [`MoeLmError::File`] if the file cannot be read; a missing one has no rows.
pub(crate) fn rows_before(path: &Path, step: u64) -> Result<Vec<StepRow>, MoeLmError> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound || step == 0 => return Ok(Vec::new()),
        text => text.map_err(MoeLmError::file(path))?,
    };
    // A job that was killed may have left half a line.
    let rows = text.lines().filter_map(|line| serde_json::from_str::<StepRow>(line).ok());
    Ok(rows.filter(|row| row.step as u64 <= step).collect())
}

/// Stops training when the process is told to (SIGTERM); told twice, the process ends at once.
pub(crate) struct StopOnSignal {
    told: Arc<AtomicBool>,
    interrupter: Interrupter,
}

impl StopOnSignal {
    pub fn new(interrupter: Interrupter) -> Result<Self, MoeLmError> {
        let told = Arc::new(AtomicBool::new(false));
        #[cfg(unix)]
        {
            use signal_hook::{consts::SIGTERM, flag};
            // In this order: the first signal sets what ends the process at the second.
            flag::register_conditional_shutdown(SIGTERM, 128 + SIGTERM, told.clone())
                .and_then(|_| flag::register(SIGTERM, told.clone()))
                .map_err(MoeLmError::file(&PathBuf::from("SIGTERM")))?;
        }
        Ok(Self { told, interrupter })
    }
}

impl TrainingCallback for StopOnSignal {
    fn on_step_end(&mut self, _: &StepContext<'_>) -> Result<(), FsepError> {
        if self.told.load(Ordering::Relaxed) {
            self.interrupter.stop(Some("SIGTERM"));
        }
        Ok(())
    }
}
