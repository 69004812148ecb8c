use burn_fsep::planner::memory::RankMemory;

use super::JobSizes;
use crate::{Dtype, MoeHfError, model::DecoderConfig};

/// Bytes as GiB.
pub(crate) fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// The error of a job whose ranks have `limit` bytes each; `None` if it fits.
pub(crate) fn misfit(job: &JobSizes, decoder: &DecoderConfig, memory: &RankMemory, limit: u64) -> Option<MoeHfError> {
    let peak = memory.peak();
    (peak.bytes > limit).then(|| MoeHfError::DoesNotFit {
        needed_gib: gib(peak.bytes),
        phase: peak.phase,
        limit_gib: gib(limit),
        advice: advice(job, decoder, limit),
    })
}

/// Which options would make a job fit: each by itself, or all of them.
fn advice(job: &JobSizes, decoder: &DecoderConfig, limit: u64) -> String {
    let peak = |job: &JobSizes| job.memory(decoder).ok().map(|memory| memory.peak().bytes);
    let fits = |job: &JobSizes| peak(job).filter(|&bytes| bytes <= limit);
    let found: Vec<String> = changes(job)
        .into_iter()
        .filter_map(|ways| ways.into_iter().find_map(|(option, job)| Some((option, fits(&job)?))))
        .map(|(option, bytes)| format!("{option} ({:.2} GiB)", gib(bytes)))
        .collect();
    if !found.is_empty() {
        return format!("What would fit: {}", found.join("; "));
    }
    let mut together = *job;
    let mut options = Vec::new();
    for mut ways in changes(job) {
        let Some((option, last)) = ways.pop() else { continue };
        // A change of what numbers come out is not made along with others.
        if last.dtype != job.dtype {
            continue;
        }
        if last.group_ranks() != job.group_ranks() {
            together.expert_parallel_size = last.expert_parallel_size;
        }
        together.sharded_optimizer |= last.sharded_optimizer;
        together.kept_layers = together.kept_layers.min(last.kept_layers);
        if last.batch != job.batch {
            together.batch = last.batch;
        }
        options.push(option);
    }
    match fits(&together) {
        Some(bytes) if !options.is_empty() => {
            format!("What would fit: {} together ({:.2} GiB)", options.join(" "), gib(bytes))
        }
        _ => "No other options make it fit: it needs more ranks, or more memory for each".into(),
    }
}

/// Options that take less memory, and the job with each; of one kind the least change first.
fn changes(job: &JobSizes) -> Vec<Vec<(String, JobSizes)>> {
    let groups = (job.group_ranks() + 1..=job.ranks)
        .filter(|size| job.ranks.is_multiple_of(*size))
        // Slots that were given are of the groups that were given.
        .map(|size| (format!("--expert-parallel-size {size}"), JobSizes { expert_parallel_size: Some(size), ..*job }));
    let sharded = (!job.sharded_optimizer && job.ranks > 1)
        .then(|| ("--sharded-optimizer".to_string(), JobSizes { sharded_optimizer: true, ..*job }));
    let kept = (job.kept_layers > 0).then(|| ("--kept-layers 0".to_string(), JobSizes { kept_layers: 0, ..*job }));
    let halves = std::iter::successors(Some(job.batch.option() / 2), |&count| Some(count / 2));
    let batches = halves.take_while(|&count| count > 0).map(|count| {
        let batch = job.batch.with(count);
        (format!("--batch {count}"), JobSizes { batch, ..*job })
    });
    let types = match job.dtype {
        Dtype::F32 => vec![(Dtype::Mixed, "mixed"), (Dtype::Bf16, "bf16")],
        Dtype::Mixed => vec![(Dtype::Bf16, "bf16")],
        Dtype::Bf16 => vec![],
    };
    let types = types.into_iter().map(|(dtype, name)| (format!("--dtype {name}"), JobSizes { dtype, ..*job }));
    vec![
        groups.collect(),
        sharded.into_iter().collect(),
        kept.into_iter().collect(),
        batches.collect(),
        types.collect(),
    ]
}
