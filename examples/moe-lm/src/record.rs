use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use burn::tensor::Tensor;
use burn_fsep::{
    FsepError, FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
    planner::RoutingCounts,
    train::{PlannerReport, StepContext, TrainingCallback},
};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::MoeLmError;

/// Losses of a rank, handed from the model's steps to the training loop.
#[derive(Debug, Clone, Default)]
pub(crate) struct StepRecorder(Arc<Mutex<Losses>>);

#[derive(Debug, Default)]
struct Losses {
    /// On its device: reading it in the step would make the host wait for it.
    train: Option<Tensor<1>>,
    valid_sum: f64,
    valid_batches: u64,
}

impl StepRecorder {
    fn with<T>(&self, act: impl FnOnce(&mut Losses) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps the loss of a step. `[1]`
    pub fn train_loss(&self, loss: Tensor<1>) {
        self.with(|losses| losses.train = Some(loss));
    }

    /// The loss of the last step; waits for the device.
    fn last_train_loss(&self) -> Result<f64, FsepError> {
        let loss = self.with(|losses| losses.train.take());
        let data = loss.map(|loss| loss.try_into_data().map_err(|error| FsepError::Device(error.to_string())));
        Ok(data.transpose()?.and_then(|data| data.iter::<f64>().next()).unwrap_or(f64::NAN))
    }

    pub fn valid_loss(&self, loss: f32) {
        self.with(|losses| {
            losses.valid_sum += f64::from(loss);
            losses.valid_batches += 1;
        });
    }

    /// Mean validation loss of this rank's batches.
    pub fn mean_valid_loss(&self) -> f64 {
        self.with(|losses| losses.valid_sum / losses.valid_batches as f64)
    }
}

/// One training step, as written to `metrics.jsonl`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StepRow {
    pub step: usize,
    /// Mean over ranks, nat a byte.
    pub loss: f64,
    /// Largest load of a rank over the mean, mean over layers: as static expert parallelism would have it.
    pub imbalance_static: f64,
    /// The same with the planner's layouts and dispatch.
    pub imbalance: f64,
    pub imbalance_p50: f64,
    pub imbalance_p95: f64,
    pub imbalance_max: f64,
    pub imbalance_static_by_layer: Vec<f64>,
    pub imbalance_by_layer: Vec<f64>,
    pub moved_slots: usize,
    pub cross_node_share: f64,
    pub planner_us: f64,
    pub dispatch_us: f64,
    pub late_layouts: u64,
    pub tokens_per_second: f64,
}

/// Results of a run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    /// Mean training loss of the last tenth of the steps, nat a byte.
    pub train_loss: f64,
    /// Loss on held-out text, nat a byte.
    pub valid_loss: f64,
    /// Entropy of the held-out text's bytes, nat a byte.
    pub unigram_entropy: f64,
    /// Mean over steps and layers of max/mean load, as static expert parallelism would have it.
    pub imbalance_static: f64,
    /// The same with the layouts and dispatch that were used.
    pub imbalance_planned: f64,
    /// Bytes trained on a second, all ranks together.
    pub tokens_per_second: f64,
    /// The same without the first tenth of the steps.
    pub tokens_per_second_after_warmup: f64,
    /// Seconds of training.
    pub seconds: f64,
    /// Optimizer steps.
    pub steps: usize,
    /// World size.
    pub ranks: usize,
}

/// Records every step on all ranks; the first rank also shows progress and writes `metrics.jsonl`.
pub(crate) struct Recorder {
    losses: StepRecorder,
    planner: PlannerReport,
    tokens_per_step: usize,
    rows: Arc<Mutex<Vec<StepRow>>>,
    /// Routing counts by layer and step, if they are to be kept.
    trace: Option<Arc<Mutex<TraceCounts>>>,
    output: Option<Output>,
    last: Instant,
}

/// Routing counts by layer and step.
pub(crate) type TraceCounts = BTreeMap<(usize, usize), RoutingCounts>;

struct Output {
    path: PathBuf,
    file: BufWriter<File>,
    bar: ProgressBar,
}

impl Output {
    fn new(path: &Path, steps: usize) -> Result<Self, MoeLmError> {
        let file = BufWriter::new(File::create(path).map_err(MoeLmError::file(path))?);
        let style = "{bar:32} step {pos}/{len}  {msg}  [{elapsed} < {eta}]";
        let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        Ok(Self { path: path.to_path_buf(), file, bar: ProgressBar::new(steps as u64).with_style(style) })
    }

    /// Writes what a file had that this one replaces.
    fn write_again(&mut self, rows: &[StepRow]) -> std::io::Result<()> {
        for row in rows {
            serde_json::to_writer(&mut self.file, row)?;
            writeln!(self.file)?;
        }
        self.bar.set_position(rows.last().map_or(0, |row| row.step as u64));
        self.bar.reset_eta();
        self.file.flush()
    }

    fn failed(&self, error: std::io::Error) -> FsepError {
        FsepError::Callback(format!("{}: {error}", self.path.display()))
    }

    fn write(&mut self, row: &StepRow) -> std::io::Result<()> {
        serde_json::to_writer(&mut self.file, row)?;
        writeln!(self.file)?;
        self.bar.inc(1);
        let message = format!(
            "loss {:.3}  imbalance {:.2} -> {:.2}  {:.0} tokens/s",
            row.loss, row.imbalance_static, row.imbalance, row.tokens_per_second
        );
        // Where no terminal shows the bar, a line now and then shows that the job is alive.
        if self.bar.is_hidden() && (row.step == 1 || row.step.is_multiple_of(25)) {
            eprintln!("step {}/{}  {message}", row.step, self.bar.length().unwrap_or(0));
        }
        self.bar.set_message(message);
        Ok(())
    }
}

impl Recorder {
    /// `rows` are those of the steps before the checkpoint that training goes on from.
    pub fn new(
        runtime: &FsepRuntime,
        losses: StepRecorder,
        planner: PlannerReport,
        tokens_per_step: usize,
        steps: usize,
        metrics: &Path,
        rows: Vec<StepRow>,
    ) -> Result<Self, MoeLmError> {
        let mut output = (runtime.rank() == 0).then(|| Output::new(metrics, steps)).transpose()?;
        if let Some(output) = &mut output {
            output.write_again(&rows).map_err(MoeLmError::file(metrics))?;
        }
        let now = Instant::now();
        let rows = Arc::new(Mutex::new(rows));
        Ok(Self { losses, planner, tokens_per_step, rows, trace: None, output, last: now })
    }

    /// Also keeps the routing counts of all steps, in the place returned.
    pub fn record_trace(&mut self) -> Arc<Mutex<TraceCounts>> {
        self.trace.get_or_insert_default().clone()
    }

    /// The rows recorded so far and later.
    pub fn rows(&self) -> Arc<Mutex<Vec<StepRow>>> {
        self.rows.clone()
    }
}

impl TrainingCallback for Recorder {
    fn on_train_start(&mut self, _: &FsepRuntime) -> Result<(), FsepError> {
        self.last = Instant::now();
        Ok(())
    }

    fn on_step_end(&mut self, context: &StepContext<'_>) -> Result<(), FsepError> {
        let mut loss = [self.losses.last_train_loss()?];
        let comm = context.runtime.comm();
        comm.all_reduce(Operation::new("mean loss"), ReduceBuffer::F64(&mut loss), ReduceOp::Mean)?;
        let stats = context.runtime.stats();
        if let Some(trace) = &self.trace {
            let mut trace = trace.lock().unwrap_or_else(PoisonError::into_inner);
            trace.extend(stats.layers.iter().map(|l| ((l.layer, context.iteration - 1), l.counts.as_ref().clone())));
        }
        let now = Instant::now();
        let row = StepRow {
            step: context.iteration,
            loss: loss[0],
            imbalance_static: stats.imbalance_static(),
            imbalance: stats.imbalance(),
            imbalance_p50: stats.imbalance_percentile(50.0),
            imbalance_p95: stats.imbalance_percentile(95.0),
            imbalance_max: stats.imbalance_percentile(100.0),
            imbalance_static_by_layer: stats.layers.iter().map(|layer| layer.imbalance_static).collect(),
            imbalance_by_layer: stats.layers.iter().map(|layer| layer.imbalance).collect(),
            moved_slots: stats.moved_slots(),
            cross_node_share: stats.cross_node_share(),
            planner_us: self.planner.solve_time().as_secs_f64() * 1e6,
            dispatch_us: stats.layers.iter().map(|layer| layer.dispatch_time.as_secs_f64() * 1e6).sum(),
            late_layouts: self.planner.late(),
            tokens_per_second: self.tokens_per_step as f64 / (now - self.last).as_secs_f64(),
        };
        self.last = now;
        if let Some(output) = &mut self.output {
            output.write(&row).map_err(|error| output.failed(error))?;
        }
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).push(row);
        Ok(())
    }

    /// A job that goes on from the checkpoint keeps the rows up to there.
    fn on_checkpoint(&mut self, _: &mut BTreeMap<String, Vec<u8>>) -> Result<(), FsepError> {
        match &mut self.output {
            Some(output) => output.file.flush().map_err(|error| output.failed(error)),
            None => Ok(()),
        }
    }

    fn on_train_end(&mut self, _: &FsepRuntime) -> Result<(), FsepError> {
        if let Some(output) = &mut self.output {
            output.bar.finish();
            output.file.flush().map_err(|error| output.failed(error))?;
        }
        Ok(())
    }
}
