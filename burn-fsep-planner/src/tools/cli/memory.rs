use std::fmt::Write as _;

use super::{CliError, MemoryArgs, specs};
use crate::{
    memory::{RankMemory, RankSplit, changes_that_fit},
    tools::simulator::SimulatorError,
};

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// What takes a rank's memory.
///
/// # Errors
///
/// [`CliError::DoesNotFit`], with the same table, if the cluster's ranks have less; otherwise as files and options say.
pub(super) fn table(args: &MemoryArgs) -> Result<String, CliError> {
    let simulator = specs::simulator(&args.specs)?;
    let (cluster, model) = (simulator.cluster(), simulator.model());
    let world_size = cluster.world_size();
    let group_ranks = args.groups.unwrap_or(world_size);
    let split = RankSplit { world_size: world_size as u64, group_ranks: group_ranks as u64, zero: args.zero };
    let option = |source: SimulatorError| CliError::Option { source };
    split.check().map_err(|source| option(source.into()))?;
    let training = model.training_sizes(args.imbalance);
    let sizes = model.memory_model(group_ranks);
    let of_job = |source: crate::memory::MemoryError| match source.field() {
        Some("max_over_mean") => {
            option(SimulatorError::setting("imbalance", args.imbalance, "a number from 1 to 1000000"))
        }
        _ => option(source.into()),
    };
    let memory = RankMemory::of(&sizes, &training, split).map_err(of_job)?;
    let mut table = format!(
        "{:.1} billion parameters, {:.1} of them replicated; {world_size} ranks, experts shared by groups of {group_ranks}, {} slots a \
         rank; {} tokens a rank in {} micro-batch(es); GiB of a rank\n\n",
        model.parameters() / 1e9,
        model.replicated_parameters() / 1e9,
        sizes.moe.slots_per_rank,
        training.tokens * training.micro_batches,
        training.micro_batches,
    );
    rows(&memory, &mut table);
    let peak = memory.peak();
    let Some(limit) = cluster.usable_memory_bytes() else {
        let _ = writeln!(
            table,
            "\npeak: {:.2} in {}; the cluster's file has no memory_bytes_per_rank",
            gib(peak.bytes),
            peak.phase
        );
        return Ok(table);
    };
    if peak.bytes > limit {
        let changes = changes_that_fit(&sizes, &training, split, limit).map_err(of_job)?;
        let fitting = changes.iter().map(|(change, bytes)| format!("{change}: {:.1} GiB", gib(*bytes)));
        let advice = match fitting.collect::<Vec<_>>().join("; ") {
            none if none.is_empty() => {
                "No change of groups, ZeRO, micro-batches or recomputation makes it fit: it needs more ranks, or more \
                                        memory a rank"
                    .to_string()
            }
            some => format!("What would fit: {some}"),
        };
        return Err(CliError::DoesNotFit { table, needed: gib(peak.bytes), limit: gib(limit), advice });
    }
    let _ = writeln!(
        table,
        "\npeak: {:.2} in {}, of {:.2} that tensors may take ({:.2} of a rank's {:.2}): it fits",
        gib(peak.bytes),
        peak.phase,
        gib(limit),
        cluster.usable_memory_share,
        cluster.memory_bytes_per_rank / (1u64 << 30) as f64,
    );
    Ok(table)
}

fn rows(memory: &RankMemory, table: &mut String) {
    let mut line = |name: &str, bytes: u64| {
        let _ = writeln!(table, "{name:<52}{:>10.3}", gib(bytes));
    };
    for (name, part) in
        [("parameters", memory.parameters), ("gradients", memory.gradients), ("optimizer state", memory.optimizer)]
    {
        line(&format!("{name}, replicated"), part.replicated);
        line(&format!("{name}, expert shards"), part.experts);
    }
    line("restored experts", memory.restored_experts);
    line("gradients of a layer's slots", memory.slot_gradients);
    line("the same on their way to the shards", memory.resharding);
    line("copies of a layer's shards", memory.shard_copies);
    line("buckets of replicated gradients", memory.gradient_buckets);
    line("means of shards' gradients in f32, besides", memory.single_precision_means);
    line("gradients of earlier micro-batches", memory.accumulated_gradients);
    line("activations, attention and dense networks", memory.activations.attention);
    line("activations, experts", memory.activations.experts);
    line("activations, routing", memory.activations.routing);
    line("copies of replicated parameters", memory.activations.parameter_copies);
    line("logits and loss", memory.logits);
    line("backward of a layer's experts, besides", memory.expert_transient.max(memory.expert_transient_late));
    line("backward of a layer, besides", memory.layer_transient);
    let _ = writeln!(table);
    for phase in memory.phases() {
        let _ = writeln!(table, "{:<52}{:>10.3}", format!("all together in {}", phase.phase), gib(phase.bytes));
    }
}
