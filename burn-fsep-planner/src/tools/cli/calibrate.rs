use std::time::Duration;

use super::{CalibrateArgs, CliError, files::write_whole};
use crate::tools::simulator::measure::Measurement;

pub(super) fn calibrate(args: &CalibrateArgs) -> Result<String, CliError> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let measurement = Measurement {
        hidden_size: args.hidden_size,
        intermediate_size: args.intermediate_size,
        ranks: args.ranks.unwrap_or_else(cores),
        inter_node_bytes_per_second: args.inter_node_bytes_per_second,
        duration: Duration::from_secs(1),
    };
    let constants = measurement.run().map_err(|source| CliError::Option { source })?;
    let mut json = serde_json::to_string_pretty(&constants).map_err(|source| CliError::Json {
        path: args.output.clone(),
        source,
        expected: "numbers that JSON can hold",
    })?;
    json.push('\n');
    write_whole(&args.output, json.as_bytes())?;
    Ok(format!(
        "{} rank(s): {:.2} GFLOP/s and {:.2} GB/s copied by each: {}\n",
        measurement.ranks,
        constants.matmul_flops_per_second() / 1e9,
        constants.intra_node_bytes_per_second / 1e9,
        args.output.display()
    ))
}
