use std::{fmt::Write as _, time::Duration};

use super::{CliError, ReplayArgs};
use crate::{
    PlannerError, Strategy, Topology,
    correction::CorrectionConfig,
    replay::{ReplayConfig, ReplayStep, Spread, replay},
    trace::Trace,
};

pub(super) fn table(args: &ReplayArgs) -> Result<String, CliError> {
    let text = std::fs::read_to_string(&args.trace).map_err(CliError::file(&args.trace))?;
    let trace = Trace::from_csv(&text).map_err(|source| CliError::Trace { path: args.trace.clone(), source })?;
    let config = config(args, &trace).map_err(CliError::plan(&args.trace))?;
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
        let steps = replay(&trace, &config, strategy).map_err(CliError::plan(&args.trace))?;
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
            return Err(CliError::NoSteps { path: args.trace.clone(), skipped: args.skip_steps });
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
    table.push_str(
        "\nmean, p50, p99, max: largest load of a rank over the mean load, 1 is perfect; times are medians\n",
    );
    Ok(table)
}

fn config(args: &ReplayArgs, trace: &Trace) -> Result<ReplayConfig, PlannerError> {
    Ok(ReplayConfig {
        topology: Topology::uniform(trace.num_ranks(), args.ranks_per_node)?,
        slots_per_rank: args.slots_per_rank,
        seed: args.seed,
        correction: args.correction.then(CorrectionConfig::free),
    })
}
