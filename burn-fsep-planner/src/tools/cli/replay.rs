use std::{fmt::Write as _, path::PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use super::{CliError, ReplayArgs, args::TraceArgs, summary::Summary};
use crate::{
    PlannerError, PlannerStrategy, Topology,
    repair::RepairConfig,
    tools::{
        least_max_load,
        replay::{ReplayConfig, ReplayStep, Spread, replay},
        trace::Trace,
        workload::{WorkloadError, WorkloadShape},
    },
};

/// A trace under some strategies.
pub(super) struct Replays {
    pub path: PathBuf,
    pub trace: Trace,
    pub config: ReplayConfig,
    /// Every step of every layer, by strategy.
    pub steps: Vec<(PlannerStrategy, Vec<ReplayStep>)>,
    pub skip_steps: usize,
}

impl Replays {
    /// Replays the trace that the options name.
    pub fn run(args: &TraceArgs) -> Result<Self, CliError> {
        let (path, trace) = load(args)?;
        let config = config(args, &trace).map_err(CliError::plan(&path))?;
        let strategies = if args.strategy.is_empty() { PlannerStrategy::ALL.to_vec() } else { args.strategy.clone() };
        // Drawn on standard error, and only if that is a terminal.
        let progress = ProgressBar::new(strategies.len() as u64);
        progress.set_style(ProgressStyle::with_template("{msg:>10} {wide_bar} {pos}/{len} {eta}").unwrap_or_else(
            |_| {
                ProgressStyle::default_bar() // the template is constant: only a typing error leads here
            },
        ));
        let mut steps = Vec::new();
        for strategy in strategies {
            progress.set_message(strategy.name());
            steps.push((strategy, replay(&trace, &config, strategy).map_err(CliError::plan(&path))?));
            progress.inc(1);
        }
        progress.finish_and_clear();
        Ok(Self { path, trace, config, steps, skip_steps: args.skip_steps })
    }

    /// The steps that count.
    pub fn counted<'a>(&self, steps: &'a [ReplayStep]) -> Vec<&'a ReplayStep> {
        steps.iter().filter(|step| step.step >= self.skip_steps).collect()
    }

    /// One line a strategy.
    pub fn summaries(&self) -> Result<Vec<Summary>, CliError> {
        let slots = self.trace.num_ranks() * self.config.slots_per_rank;
        self.steps
            .iter()
            .map(|(strategy, steps)| Summary::of(strategy.name(), &self.counted(steps), slots))
            .collect::<Option<_>>()
            .ok_or_else(|| CliError::NoSteps { path: self.path.clone(), skipped: self.skip_steps })
    }

    /// What no layout beats in the steps that count.
    pub fn bound(&self) -> Result<Spread, CliError> {
        let mut bounds = Vec::new();
        for layer in self.trace.layers() {
            for (_, counts) in self.trace.steps(layer).skip(self.skip_steps) {
                let mean = counts.total() as f64 / counts.num_ranks() as f64;
                let least = least_max_load(counts, self.config.slots_per_rank).map_err(CliError::plan(&self.path))?;
                bounds.push(if mean > 0.0 { least as f64 / mean } else { 1.0 });
            }
        }
        Spread::of(bounds).ok_or_else(|| CliError::NoSteps { path: self.path.clone(), skipped: self.skip_steps })
    }

    /// What was replayed, in a sentence.
    pub fn setting(&self) -> String {
        format!(
            "{} layers, {} ranks on {} nodes, {} experts, {} slots a rank; first {} step(s) of a layer not counted; {}",
            self.trace.layers().len(),
            self.trace.num_ranks(),
            self.config.topology.num_nodes(),
            self.trace.num_experts(),
            self.config.slots_per_rank,
            self.skip_steps,
            if self.config.repair.is_some() { "layouts repaired in the step" } else { "no repair" },
        )
    }
}

pub(super) fn table(args: &ReplayArgs) -> Result<String, CliError> {
    let replays = Replays::run(&args.trace)?;
    let mut table = format!("{}\n\n", replays.setting());
    let widths = [18, 8, 8, 8, 8, 14, 15, 13, 11, 11, 13];
    let mut line = |cells: &[&str]| {
        let (first, others) = cells.split_first().unwrap_or((&"", &[]));
        let _ = write!(table, "{first:<width$}", width = widths[0]);
        for (cell, width) in others.iter().zip(&widths[1..]) {
            let _ = write!(table, "{cell:>width$}");
        }
        table.push('\n');
    };
    line(&Summary::COLUMNS);
    for summary in replays.summaries()? {
        line(&summary.cells().each_ref().map(String::as_str));
    }
    let Spread { mean, p50, p99, max, .. } = replays.bound()?;
    let bound = [mean, p50, p99, max].map(|value| format!("{value:.4}"));
    line(&["no layout beats", &bound[0], &bound[1], &bound[2], &bound[3]]);
    let _ = writeln!(table, "\n{}", Summary::LEGEND);
    Ok(table)
}

/// The trace or workload, and what to call it in messages.
fn load(args: &TraceArgs) -> Result<(PathBuf, Trace), CliError> {
    match (&args.trace, args.workload, args.ranks) {
        (None, Some(workload), Some(ranks)) => {
            let shape = WorkloadShape {
                topology: Topology::uniform(ranks, args.ranks_per_node).map_err(WorkloadError::from)?,
                num_experts: args.experts,
                topk: args.topk,
                tokens_per_rank: args.tokens_per_rank,
                seed: args.seed,
            };
            Ok((workload.name().into(), workload.trace(&shape, args.layers, args.steps)?))
        }
        (path, ..) => {
            // The parser lets no command through that has neither; then the name is empty and so is the file's.
            let path = path.clone().unwrap_or_default();
            let text = std::fs::read_to_string(&path).map_err(CliError::file(&path))?;
            let trace = Trace::from_csv(&text).map_err(|source| CliError::Trace { path: path.clone(), source })?;
            Ok((path, trace))
        }
    }
}

fn config(args: &TraceArgs, trace: &Trace) -> Result<ReplayConfig, PlannerError> {
    Ok(ReplayConfig {
        topology: Topology::uniform(trace.num_ranks(), args.ranks_per_node)?,
        slots_per_rank: args.slots_per_rank,
        seed: args.seed,
        repair: args.repair.then(RepairConfig::free),
    })
}
