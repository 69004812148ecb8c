//! The files that describe clusters and models.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::{CliError, SpecArgs};
use crate::tools::simulator::{ClusterSpec, MeasuredConstants, ModelSpec, Simulator};

const CLUSTER: &str = "the fields of examples/simulate/a100-4x8.json: nodes, ranks_per_node, constants, inter_node_ports, \
     memory_bytes_per_second, elementwise_passes, layer_overhead_seconds, straggler_factor, and optionally those of h100-dgx.json";
const MODEL: &str = "the fields of examples/simulate/mixtral-8x7b-e8k2.json: layers, hidden_size, intermediate_size, \
     experts, topk, slots_per_rank, attention_heads, key_value_heads, vocabulary, element_bytes, sequence_length, \
     sequences_per_rank, micro_batches, recompute, and optionally weights, tensor_parallel, architecture and training";
const CONSTANTS: &str = "what `fsep-planner calibrate` writes: seconds_per_assignment, bytes_per_token, \
     intra_node_bytes_per_second, inter_node_bytes_per_second, hidden_size, intermediate_size";

pub(super) fn simulator(args: &SpecArgs) -> Result<Simulator, CliError> {
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

pub(super) fn read(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path).map_err(CliError::file(path))
}
