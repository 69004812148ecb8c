use std::{fmt::Write as _, path::Path};

use serde::de::DeserializeOwned;

use super::{CliError, SimulateArgs};
use crate::tools::{
    simulator::{
        ClusterSpec, MeasuredConstants, ModelSpec, Simulator, SimulatorError, StepTime, SyntheticRouting, TraceRun,
    },
    trace::Trace,
};

const CLUSTER: &str = "the fields of examples/simulate/a100-4x8.json: nodes, ranks_per_node, constants, inter_node_ports, \
     memory_bytes_per_second, elementwise_passes, layer_overhead_seconds, straggler_factor";
const MODEL: &str = "the fields of examples/simulate/mixtral-8x7b-e8k2.json: layers, hidden_size, intermediate_size, \
     experts, topk, slots_per_rank, attention_heads, key_value_heads, vocabulary, element_bytes, sequence_length, \
     sequences_per_rank, micro_batches, recompute, and optionally weights and tensor_parallel";
const CONSTANTS: &str = "what `fsep-planner calibrate` writes: seconds_per_assignment, bytes_per_token, \
     intra_node_bytes_per_second, inter_node_bytes_per_second, hidden_size, intermediate_size";

pub(super) fn table(args: &SimulateArgs) -> Result<String, CliError> {
    let simulator = simulator(args)?;
    let (cluster, model) = (simulator.cluster(), simulator.model());
    let tokens = model.tokens() * model.micro_batches as f64 * cluster.world_size() as f64;
    let rows = if args.imbalance.is_empty() { by_strategy(args, &simulator)? } else { by_imbalance(args, &simulator)? };
    let balanced = simulator.step_of_imbalance(1.0).map_err(|source| CliError::Option { source })?;

    let mut table = format!(
        "{:.1} billion parameters, {} layers, {} ranks on {} nodes; {tokens} tokens a step in {} micro-batch(es); \
         seconds of a step\n\n{:<10}{:>9}{:>9}",
        model.parameters() / 1e9,
        model.layers,
        cluster.world_size(),
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
        "\nmax/mean: largest load of a rank over the mean load, mean over layers and steps; restore: what prefetching \
         does not hide; balanced: the router forced to uniform\n",
    );
    Ok(table)
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
    let run = TraceRun { skip_steps: args.skip_steps, seed: args.seed };
    let strategies = if args.strategy.is_empty() { simulator.strategies() } else { args.strategy.clone() };
    let row = |strategy| {
        let outcome = simulator.run_trace(&trace, run, strategy).map_err(|source| from_drawn(args, source))?;
        Ok((strategy.name().to_string(), outcome.max_over_mean, outcome.time))
    };
    strategies.into_iter().map(row).collect()
}

/// Files have been checked on their own: what is wrong now is an option, the trace, or a model that the strategy does
/// not fit.
fn from_drawn(args: &SimulateArgs, source: SimulatorError) -> CliError {
    let trace = args.trace.as_ref().unwrap_or(&args.model);
    match source {
        SimulatorError::Planner(source) => CliError::Plan { path: trace.clone(), source },
        SimulatorError::Empty(_) => CliError::NoSteps { path: trace.clone(), skipped: args.skip_steps },
        source if matches!(source.field(), Some("sigma" | "steps")) => CliError::Option { source },
        source => match std::fs::read_to_string(&args.model) {
            Ok(text) => CliError::setting(&args.model, &text)(source),
            Err(error) => CliError::file(&args.model)(error),
        },
    }
}

fn simulator(args: &SimulateArgs) -> Result<Simulator, CliError> {
    let (mut cluster, text): (ClusterSpec, String) = json(&args.cluster, CLUSTER)?;
    cluster.check().map_err(CliError::setting(&args.cluster, &text))?;
    if let Some(path) = &args.constants {
        let (constants, text): (MeasuredConstants, String) = json(path, CONSTANTS)?;
        constants.check().map_err(CliError::setting(path, &text))?;
        cluster.constants = constants;
    }
    let (model, text): (ModelSpec, String) = json(&args.model, MODEL)?;
    Simulator::new(cluster, model).map_err(CliError::setting(&args.model, &text))
}

fn json<T: DeserializeOwned>(path: &Path, expected: &'static str) -> Result<(T, String), CliError> {
    let text = read(path)?;
    match serde_json::from_str(&text) {
        Ok(value) => Ok((value, text)),
        Err(source) => Err(CliError::Json { path: path.to_path_buf(), source, expected }),
    }
}

fn read(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path).map_err(CliError::file(path))
}
