use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use burn_fsep::{FsepRuntime, planner::RoutingCounts};
use burn_fsep_planner::tools::trace::Trace;
use serde::Serialize;

use crate::{MoeHfError, files::write_whole};

/// What is kept of all steps; equal on all ranks.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Summary {
    /// World size.
    pub ranks: usize,
    /// Optimizer steps.
    pub steps: usize,
    /// Of each step, mean over ranks, with the load-balancing loss.
    pub losses: Vec<f64>,
    /// Largest load of a rank over the mean, mean over layers: as static expert parallelism would have it.
    pub imbalance_static: Vec<f64>,
    /// The same with the planner's layouts and dispatch.
    pub imbalance_planned: Vec<f64>,
    /// Loss on held-out text in nat a token, without the load-balancing loss.
    pub valid_loss_before: Option<f64>,
    /// The same after the last step.
    pub valid_loss_after: Option<f64>,
    /// The most memory of a GPU or a process in training, in GiB.
    pub peak_gib: Option<f64>,
    /// What was estimated before, without what a process or a GPU's context takes by itself.
    pub estimated_peak_gib: Option<f64>,
    /// All ranks together.
    pub tokens_per_second: f64,
    /// Seconds of training.
    pub seconds: f64,
}

/// Keeps and shows what steps have done.
pub(super) struct Recorder {
    pub summary: Summary,
    /// Routing counts by layer and step, if they are to be kept.
    trace: Option<BTreeMap<(usize, usize), RoutingCounts>>,
    steps: usize,
    shows: bool,
    began: Instant,
    shown: Instant,
}

impl Recorder {
    pub fn new(runtime: &FsepRuntime, steps: usize, keeps_trace: bool) -> Self {
        let is_first = runtime.rank() == 0;
        Self {
            summary: Summary { ranks: runtime.world_size(), ..Summary::default() },
            trace: (keeps_trace && is_first).then(BTreeMap::new),
            steps,
            shows: is_first,
            began: Instant::now(),
            shown: Instant::now(),
        }
    }

    /// Keeps a step of this loss.
    pub fn add(&mut self, runtime: &FsepRuntime, loss: f64) {
        let (stats, summary) = (runtime.stats(), &mut self.summary);
        summary.losses.push(loss);
        summary.imbalance_static.push(stats.imbalance_static());
        summary.imbalance_planned.push(stats.imbalance());
        let step = summary.steps;
        summary.steps += 1;
        if let Some(trace) = &mut self.trace {
            trace.extend(stats.layers.iter().map(|layer| ((layer.layer, step), layer.counts.as_ref().clone())));
        }
        let is_due = step == 0 || step + 1 == self.steps || self.shown.elapsed() > Duration::from_secs(3);
        if self.shows && is_due {
            self.shown = Instant::now();
            eprintln!(
                "step {}/{}  loss {loss:.4}  imbalance {:.2} -> {:.2} (planned)",
                step + 1,
                self.steps,
                stats.imbalance_static(),
                stats.imbalance()
            );
        }
    }

    /// Ends the measurement of time.
    pub fn finish(&mut self, tokens_per_step: usize) {
        self.summary.seconds = self.began.elapsed().as_secs_f64();
        let tokens = (tokens_per_step * self.summary.steps) as f64;
        self.summary.tokens_per_second = if tokens > 0.0 { tokens / self.summary.seconds } else { 0.0 };
    }

    /// Writes the routing of all steps, as `fsep-planner` reads it.
    pub fn write_trace(&mut self, path: &Path) -> Result<(), MoeHfError> {
        let Some(trace) = self.trace.take() else { return Ok(()) };
        let trace = Trace::new(trace)
            .map_err(|error| MoeHfError::Model(format!("--record-trace: there is no routing to record: {error}")))?;
        write_whole(path, trace.to_csv().as_bytes())
    }
}

impl Summary {
    /// The report at the end of a command.
    pub fn report(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<34}{value}");
        };
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let tenth = self.losses.len().div_ceil(10);
        if !self.losses.is_empty() {
            let (first, last) = (&self.losses[..tenth], &self.losses[self.losses.len() - tenth..]);
            line("training loss, first tenth", format!("{:.4}", mean(first)));
            line("training loss, last tenth", format!("{:.4}", mean(last)));
        }
        if let (Some(before), Some(after)) = (self.valid_loss_before, self.valid_loss_after) {
            line("loss on held-out text, before", format!("{before:.4} nat/token"));
            line("loss on held-out text, after", format!("{after:.4} nat/token"));
        }
        if !self.losses.is_empty() {
            line("expert imbalance, static EP", format!("{:.3} max/mean", mean(&self.imbalance_static)));
            line("expert imbalance, as planned", format!("{:.3} max/mean", mean(&self.imbalance_planned)));
            if let (Some(peak), Some(estimated)) = (self.peak_gib, self.estimated_peak_gib) {
                line("peak memory", format!("{peak:.2} GiB, estimated {estimated:.2}"));
            }
            line("speed", format!("{:.0} tokens/s", self.tokens_per_second));
            line("training time", format!("{:.1} s for {} steps", self.seconds, self.steps));
        }
        text
    }
}
