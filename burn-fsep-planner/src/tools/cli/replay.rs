use std::{fmt::Write as _, path::PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use super::{CliError, ReplayArgs, args::TraceArgs, summary::Summary};
use crate::{
    PlannerError, PlannerStrategy, Topology,
    dispatch::{DispatchPlan, ReplicaChoice},
    repair::RepairConfig,
    tools::{
        least_max_load,
        replay::{ReplayConfig, ReplayStep, Spread, replay_each},
        token_trace::TokenTrace,
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
    /// Rows of tokens to other ranks in the steps that count, by strategy, if it is known what each token chose.
    pub token_rows: Vec<(PlannerStrategy, TokenRows)>,
}

/// What tokens need to reach their experts on other ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct TokenRows {
    /// A row for each assignment.
    pub by_assignment: u64,
    /// A row for each rank, replicas taken in the order of tokens.
    pub by_rank: u64,
    /// The same, replicas chosen so that tokens share ranks.
    pub shared: u64,
}

impl TokenRows {
    fn add(&mut self, plan: &DispatchPlan, tokens: &[Vec<Vec<u32>>]) {
        self.by_assignment += plan.off_rank_tokens();
        for (source, tokens) in tokens.iter().enumerate() {
            self.by_rank += ReplicaChoice::InOrder.rows_to_other_ranks(plan, source, tokens);
            self.shared += ReplicaChoice::SharedRanks.rows_to_other_ranks(plan, source, tokens);
        }
    }
}

impl Replays {
    /// Replays the trace that the options name.
    pub fn run(args: &TraceArgs) -> Result<Self, CliError> {
        let Loaded { path, trace, tokens } = load(args)?;
        let config = config(args, &trace).map_err(CliError::plan(&path))?;
        let strategies = if args.strategy.is_empty() { PlannerStrategy::ALL.to_vec() } else { args.strategy.clone() };
        // Drawn on standard error, and only if that is a terminal.
        let progress = ProgressBar::new(strategies.len() as u64);
        progress.set_style(ProgressStyle::with_template("{msg:>10} {wide_bar} {pos}/{len} {eta}").unwrap_or_else(
            |_| {
                ProgressStyle::default_bar() // the template is constant: only a typing error leads here
            },
        ));
        let (mut steps, mut token_rows) = (Vec::new(), Vec::new());
        for strategy in strategies {
            progress.set_message(strategy.name());
            let (mut replayed, mut rows) = (Vec::new(), TokenRows::default());
            let visit = |step: &ReplayStep, plan: &DispatchPlan| {
                replayed.push(step.clone());
                let tokens = tokens.as_ref().filter(|_| step.step >= args.skip_steps);
                if let Some(tokens) = tokens.and_then(|tokens| tokens.tokens(step.layer, step.step)) {
                    rows.add(plan, tokens);
                }
            };
            replay_each(&trace, &config, strategy, visit).map_err(CliError::plan(&path))?;
            steps.push((strategy, replayed));
            token_rows.extend(tokens.is_some().then_some((strategy, rows)));
            progress.inc(1);
        }
        progress.finish_and_clear();
        Ok(Self { path, trace, config, steps, skip_steps: args.skip_steps, token_rows })
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
    table.push_str(&token_table(&replays.token_rows));
    Ok(table)
}

/// Rows of tokens to other ranks, one line a strategy; nothing if they are not known.
fn token_table(rows: &[(PlannerStrategy, TokenRows)]) -> String {
    let mut table = String::new();
    if rows.is_empty() {
        return table;
    }
    let _ = writeln!(
        table,
        "\nrows of tokens to other ranks\n{:<18}{:>16}{:>16}{:>18}",
        "strategy", "an assignment", "a rank", "replicas chosen"
    );
    for (strategy, TokenRows { by_assignment, by_rank, shared }) in rows {
        let share = |rows: u64| format!("{rows} {:.3}", rows as f64 / (*by_assignment).max(1) as f64);
        let _ =
            writeln!(table, "{:<18}{by_assignment:>16}{:>16}{:>18}", strategy.name(), share(*by_rank), share(*shared));
    }
    table.push_str("a rank: each token once to each rank that computes any of its experts; replicas chosen: on ranks that it goes to anyway\n");
    table
}

/// A trace or workload, what to call it in messages, and what each token chose, if that is known.
struct Loaded {
    path: PathBuf,
    trace: Trace,
    tokens: Option<TokenTrace>,
}

fn load(args: &TraceArgs) -> Result<Loaded, CliError> {
    let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(CliError::file(path));
    if let Some(path) = &args.tokens {
        let damaged = |source| CliError::Trace { path: path.clone(), source };
        let tokens = TokenTrace::from_csv(&read(path)?, args.experts).map_err(damaged)?;
        let trace = tokens.counts().map_err(damaged)?;
        return Ok(Loaded { path: path.clone(), trace, tokens: Some(tokens) });
    }
    let (path, trace) = match (&args.trace, args.workload, args.ranks) {
        (None, Some(workload), Some(ranks)) => {
            let shape = WorkloadShape {
                topology: Topology::uniform(ranks, args.ranks_per_node).map_err(WorkloadError::from)?,
                num_experts: args.experts,
                topk: args.topk,
                tokens_per_rank: args.tokens_per_rank,
                seed: args.seed,
            };
            (workload.name().into(), workload.trace(&shape, args.layers, args.steps)?)
        }
        (path, ..) => {
            // The parser lets no command through that has neither; then the name is empty and so is the file's.
            let path = path.clone().unwrap_or_default();
            let trace =
                Trace::from_csv(&read(&path)?).map_err(|source| CliError::Trace { path: path.clone(), source })?;
            (path, trace)
        }
    };
    Ok(Loaded { path, trace, tokens: None })
}

fn config(args: &TraceArgs, trace: &Trace) -> Result<ReplayConfig, PlannerError> {
    Ok(ReplayConfig {
        topology: Topology::uniform(trace.num_ranks(), args.ranks_per_node)?,
        slots_per_rank: args.slots_per_rank,
        seed: args.seed,
        repair: args.repair.then(RepairConfig::free),
    })
}
