use std::fmt::Write as _;

use super::{
    CliError, SimulateArgs,
    specs::{read, simulator},
};
use crate::tools::{
    simulator::{GroupSpec, Simulator, SimulatorError, StepTime, SyntheticRouting, TraceRun},
    trace::Trace,
};

pub(super) fn table(args: &SimulateArgs) -> Result<String, CliError> {
    let option = |source| CliError::Option { source };
    let simulator = simulator(&args.specs)?;
    let groups = GroupSpec { ranks: args.groups.unwrap_or(simulator.groups().ranks), zero: args.zero };
    let simulator = simulator.with_groups(groups).map_err(option)?;
    let (cluster, model) = (simulator.cluster(), simulator.model());
    let tokens = model.tokens() * model.micro_batches as f64 * cluster.world_size() as f64;
    let rows = if args.imbalance.is_empty() { by_strategy(args, &simulator)? } else { by_imbalance(args, &simulator)? };
    let balanced = simulator.step_of_imbalance(1.0).map_err(option)?;

    let mut table = format!(
        "{:.1} billion parameters, {} layers, {} ranks on {} nodes; {tokens} tokens a step in {} micro-batch(es); \
         seconds of a step\n\n{:<10}{:>9}{:>9}",
        model.parameters() / 1e9,
        model.layers,
        world(&simulator),
        cluster.nodes,
        model.micro_batches,
        "strategy",
        "max/mean",
        "step",
    );
    for (name, _) in balanced.parts() {
        let _ = write!(table, "{name:>11}");
    }
    let _ = writeln!(table, "{:>12}{:>12}", "tokens/s", "% balanced");
    // Each number begins with a space: those of a slow machine may be wider than their columns.
    for (name, max_over_mean, time) in rows.into_iter().chain([("balanced".to_string(), 1.0, balanced)]) {
        let _ = write!(table, "{name:<10} {max_over_mean:>8.4} {:>8.3}", time.total());
        for (_, seconds) in time.parts() {
            let _ = write!(table, " {seconds:>10.3}");
        }
        let share = balanced.total() / time.total() * 100.0;
        let _ = writeln!(table, " {:>11.0} {share:>11.1}", tokens / time.total());
    }
    table.push_str(
        "\nmax/mean: largest load of a rank over the mean load, mean over layers and steps, of the group that is slowest in backward; restore: what prefetching \
         does not hide; balanced: the router forced to uniform\n",
    );
    Ok(table)
}

/// The ranks, and who shares the experts where not all do.
fn world(simulator: &Simulator) -> String {
    let (ranks, groups) = (simulator.cluster().world_size(), simulator.groups().ranks);
    if ranks == groups { ranks.to_string() } else { format!("{ranks}, in groups of {groups},") }
}

type Row = (String, f64, StepTime);

fn by_imbalance(args: &SimulateArgs, simulator: &Simulator) -> Result<Vec<Row>, CliError> {
    let row = |&imbalance: &f64| Ok(("given".to_string(), imbalance, simulator.step_of_imbalance(imbalance)?));
    args.imbalance.iter().map(row).collect::<Result<_, _>>().map_err(|source| CliError::Option { source })
}

fn by_strategy(args: &SimulateArgs, simulator: &Simulator) -> Result<Vec<Row>, CliError> {
    let routing = SyntheticRouting { sigma: args.sigma, steps: args.steps, seed: args.seed };
    let trace = match &args.trace {
        Some(path) => Trace::from_csv(&read(path)?).map_err(|source| CliError::Trace { path: path.clone(), source })?,
        None => routing.trace(simulator.cluster(), simulator.model()).map_err(|source| from_drawn(args, source))?,
    };
    let run = TraceRun { skip_steps: args.skip_steps, seed: args.seed, repair: args.repair };
    let strategies = if args.strategy.is_empty() { simulator.strategies() } else { args.strategy.clone() };
    let row = |strategy| {
        let outcome = simulator.run_trace(&trace, run, strategy).map_err(|source| from_drawn(args, source))?;
        Ok((strategy.name().to_string(), outcome.slowest_max_over_mean, outcome.time))
    };
    strategies.into_iter().map(row).collect()
}

/// Files have been checked on their own: what is wrong now is an option, the trace, or a model that the strategy does
/// not fit.
fn from_drawn(args: &SimulateArgs, source: SimulatorError) -> CliError {
    let trace = args.trace.as_ref().unwrap_or(&args.specs.model);
    match source {
        SimulatorError::Planner(source) => CliError::Plan { path: trace.clone(), source },
        SimulatorError::Empty(_) => CliError::NoSteps { path: trace.clone(), skipped: args.skip_steps },
        source if matches!(source.field(), Some("sigma" | "steps")) => CliError::Option { source },
        source => match std::fs::read_to_string(&args.specs.model) {
            Ok(text) => CliError::setting(&args.specs.model, &text)(source),
            Err(error) => CliError::file(&args.specs.model)(error),
        },
    }
}
