use std::{fmt::Write as _, path::PathBuf, time::Duration};

use super::{CliError, ReplayArgs};
use crate::{
    PlannerError, Strategy, Topology,
    correction::CorrectionConfig,
    placement::least_max_load,
    replay::{ReplayConfig, ReplayStep, Spread, replay},
    trace::Trace,
    workload::{WorkloadError, WorkloadShape},
};

pub(super) fn table(args: &ReplayArgs) -> Result<String, CliError> {
    let (name, trace) = &load(args)?;
    let config = config(args, trace).map_err(CliError::plan(name))?;
    let strategies = if args.strategy.is_empty() { Strategy::ALL.to_vec() } else { args.strategy.clone() };

    let mut table = format!(
        "{} layers, {} ranks, {} experts; {} slots a rank, {} ranks a node; first {} step(s) of a layer not counted\n\n\
         {:<18}{:>8}{:>8}{:>8}{:>8}{:>13}{:>13}{:>14}{:>12}{:>13}\n",
        trace.layers().len(),
        trace.num_ranks(),
        trace.num_experts(),
        args.slots_per_rank,
        args.ranks_per_node,
        args.skip_steps,
        "strategy",
        "mean",
        "p50",
        "p99",
        "max",
        "cross-node %",
        "moved slots %",
        "corrected %",
        "layout us",
        "dispatch us",
    );
    let slots = (trace.num_ranks() * args.slots_per_rank) as f64;
    for strategy in strategies {
        let steps = replay(trace, &config, strategy).map_err(CliError::plan(name))?;
        let counted: Vec<&ReplayStep> = steps.iter().filter(|step| step.step >= args.skip_steps).collect();
        let spread = |value: &dyn Fn(&ReplayStep) -> f64| Spread::of(counted.iter().map(|step| value(step)));
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let (Some(load), Some(crossing), Some(moved), Some(corrected), Some(layout), Some(dispatch)) = (
            spread(&|step| step.max_over_mean),
            spread(&|step| step.cross_node_share * 100.0),
            spread(&|step| step.moved_slots as f64 / slots * 100.0),
            spread(&|step| step.corrected_slots as f64 / slots * 100.0),
            spread(&|step| us(step.layout_time)),
            spread(&|step| us(step.dispatch_time)),
        ) else {
            return Err(CliError::NoSteps { path: name.clone(), skipped: args.skip_steps });
        };
        let _ = writeln!(
            table,
            "{:<18}{:>8.4}{:>8.4}{:>8.4}{:>8.4}{:>13.2}{:>13.2}{:>14.2}{:>12.1}{:>13.1}",
            strategy.name(),
            load.mean,
            load.p50,
            load.p99,
            load.max,
            crossing.mean,
            moved.mean,
            corrected.mean,
            layout.p50,
            dispatch.p50
        );
    }
    let bounds = bounds(trace, args).map_err(CliError::plan(name))?;
    if let Some(bound) = Spread::of(bounds) {
        let _ = writeln!(
            table,
            "{:<18}{:>8.4}{:>8.4}{:>8.4}{:>8.4}",
            "no layout beats", bound.mean, bound.p50, bound.p99, bound.max
        );
    }
    table.push_str(
        "\nmean, p50, p99, max: largest load of a rank over the mean load, 1 is perfect; times are medians\n",
    );
    Ok(table)
}

/// The trace or workload, and what to call it in messages.
fn load(args: &ReplayArgs) -> Result<(PathBuf, Trace), CliError> {
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

/// What no layout beats in each step that counts.
fn bounds(trace: &Trace, args: &ReplayArgs) -> Result<Vec<f64>, PlannerError> {
    let mut bounds = Vec::new();
    for layer in trace.layers() {
        for (_, counts) in trace.steps(layer).skip(args.skip_steps) {
            let mean = counts.total() as f64 / counts.num_ranks() as f64;
            let least = least_max_load(counts, args.slots_per_rank)? as f64;
            bounds.push(if mean > 0.0 { least / mean } else { 1.0 });
        }
    }
    Ok(bounds)
}

fn config(args: &ReplayArgs, trace: &Trace) -> Result<ReplayConfig, PlannerError> {
    Ok(ReplayConfig {
        topology: Topology::uniform(trace.num_ranks(), args.ranks_per_node)?,
        slots_per_rank: args.slots_per_rank,
        seed: args.seed,
        correction: args.correction.then(CorrectionConfig::free),
    })
}
