//! Training steps of a transformer with FSEPMoE layers on NVIDIA GPUs, in bf16: forward, backward, gradient
//! synchronisation and AdamW. `--backend` is what it runs on; attention and normalisation are LibTorch's there, else Burn's.
//!
//! Ranks are threads with a GPU each, over NCCL. Prints one line of JSON: median time of a step on the slowest rank, tokens
//! a second over all ranks, mean imbalance. `--timeline FILE` writes what ran when for Perfetto.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use burn::{
    module::{Module, Param},
    nn::{Initializer, Linear, LinearConfig},
    tensor::{Device, Distribution, Tensor},
};
use burn_fsep::{
    ExpertParallelism, FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig, LayerStats, ScheduleConfig,
    Timeline, TimelineRecord, TokenRows,
    comm::{
        Communicator, Operation, ReduceBuffer, ReduceOp,
        local::{LaunchConfig, launch},
        nccl::NcclConfig,
    },
    moe::RouterForcing,
    train::{FusedAdamWConfig, GradientBuckets, PlannerConfig, TrainerConfig},
};
use burn_fsep_benches::{
    BackwardMark, BackwardSpan, GpuBackend, HalfPrecision, Times,
    transformer::{attention, rms_norm},
};
use burn_fsep_planner::PlannerStrategy;
use clap::{Parser, ValueEnum};

#[derive(Parser, Clone)]
struct Args {
    /// Ranks, each with a GPU of its own.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    #[arg(long, value_enum, default_value_t)]
    backend: GpuBackend,
    #[arg(long, default_value_t = 4)]
    layers: usize,
    #[arg(long, default_value_t = 4096)]
    hidden: usize,
    #[arg(long, default_value_t = 14336)]
    ffn: usize,
    #[arg(long, default_value_t = 8)]
    experts: usize,
    #[arg(long, default_value_t = 2)]
    topk: usize,
    #[arg(long)]
    slots: Option<usize>,
    /// Sequences of a rank in a step.
    #[arg(long, default_value_t = 4)]
    sequences: usize,
    #[arg(long, default_value_t = 4096)]
    length: usize,
    #[arg(long, default_value_t = 5)]
    warmup: usize,
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Where tokens go.
    #[arg(long, value_enum, default_value_t = Routing::Natural)]
    routing: Routing,
    /// Exponent of `--routing skewed`.
    #[arg(long, default_value_t = 1.2)]
    exponent: f64,
    /// Standard deviation of `--routing biased`.
    #[arg(long, default_value_t = 1.0)]
    bias: f64,
    /// Writes where the assignments of the last step went, in all layers, for `--routing shares`.
    #[arg(long)]
    write_shares: Option<PathBuf>,
    /// What `--write-shares` has written.
    #[arg(long)]
    shares: Option<PathBuf>,
    /// Ranks that share the experts; the groups of so many are data-parallel replicas. All ranks by default.
    #[arg(long)]
    expert_parallel_size: Option<usize>,
    /// Static expert parallelism instead of FSEP.
    #[arg(long)]
    static_ep: bool,
    #[arg(long)]
    no_prefetch_forward: bool,
    #[arg(long)]
    no_prefetch_backward: bool,
    #[arg(long)]
    no_delay_reshard: bool,
    /// How tokens travel.
    #[arg(long, value_enum, default_value_t = Rows::Auto)]
    token_rows: Rows,
    /// Chunks of the tokens of a pass.
    #[arg(long, default_value_t = 1)]
    token_chunks: usize,
    /// Last layers that keep their experts from forward to backward.
    #[arg(long, default_value_t = 1)]
    kept_layers: usize,
    /// Thread blocks of exchanges that compute hides.
    #[arg(long)]
    background_ctas: Option<usize>,
    /// Replicated gradients are reduced after backward.
    #[arg(long)]
    no_buckets: bool,
    #[arg(long)]
    timeline: Option<PathBuf>,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq)]
enum Routing {
    /// By the router.
    Natural,
    /// To all experts alike.
    Balanced,
    /// To expert e in proportion to `1 / (e + 1)^exponent`.
    Skewed,
    /// By the router, with fixed random biases.
    Biased,
    /// As the file says that `--shares` names: what forced routing costs beside the router's own, with the same counts.
    Shares,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq)]
enum Rows {
    Auto,
    ByAssignment,
    /// As many rows as there are.
    Counted,
    /// As many rows as there may be.
    Bounded,
}

impl From<Rows> for TokenRows {
    fn from(rows: Rows) -> Self {
        match rows {
            Rows::Auto => Self::Auto,
            Rows::ByAssignment => Self::ByAssignment,
            Rows::Counted => Self::ByRank { counted: true },
            Rows::Bounded => Self::ByRank { counted: false },
        }
    }
}

#[derive(Module, Debug)]
struct Block {
    attention_norm: Param<Tensor<1>>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    moe_norm: Param<Tensor<1>>,
    moe: FSEPMoE,
}

#[derive(Module, Debug)]
struct Transformer {
    blocks: Vec<Block>,
}

impl Transformer {
    fn new(args: &Args, runtime: &FsepRuntime, device: &Device) -> Result<Self, FsepError> {
        let mut moe = FSEPMoEConfig::new(args.hidden, args.ffn, args.experts)
            .with_moe_router_topk(args.topk)
            .with_slots_per_rank(args.slots);
        let shares: Vec<Vec<f64>> = match &args.shares {
            Some(path) => serde_json::from_slice(&std::fs::read(path).expect("--shares names a file"))
                .expect("--shares names what --write-shares has written"),
            None => Vec::new(),
        };
        if args.static_ep {
            moe = moe.with_expert_parallelism(ExpertParallelism::Static).with_slots_per_rank(None);
        }
        let linear = || {
            let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
            LinearConfig::new(args.hidden, args.hidden).with_bias(false).with_initializer(initializer).init(device)
        };
        let norm = || Param::from_tensor(Tensor::ones([args.hidden], device));
        let forcing = |layer: usize| match args.routing {
            Routing::Natural => None,
            Routing::Balanced => Some(RouterForcing::LoadBalancing),
            Routing::Skewed => Some(RouterForcing::Shares(skewed_shares(args))),
            Routing::Biased => Some(RouterForcing::Biased(args.bias)),
            Routing::Shares => Some(RouterForcing::Shares(shares[layer].clone())),
        };
        let block = |layer| -> Result<Block, FsepError> {
            Ok(Block {
                attention_norm: norm(),
                query: linear(),
                key: linear(),
                value: linear(),
                output: linear(),
                moe_norm: norm(),
                moe: moe.clone().with_moe_router_force(forcing(layer)).try_init(runtime, device)?,
            })
        };
        Ok(Self { blocks: (0..args.layers).map(block).collect::<Result<_, _>>()? })
    }

    /// `[B * L, D] -> [B * L, D]`
    fn forward(
        &self,
        x: Tensor<2>,
        length: usize,
        runtime: &FsepRuntime,
        buckets: Option<&GradientBuckets>,
    ) -> Tensor<2> {
        const HEAD: usize = 128;
        let [tokens, hidden] = x.dims();
        let (sequences, heads) = (tokens / length, hidden / HEAD);
        self.blocks.iter().fold(x, |x, block| {
            let prepared = buckets.map(|buckets| buckets.prepare(block, &x));
            let block = prepared.as_ref().unwrap_or(block);
            let span = runtime.timeline().and_then(|timeline| timeline.compute("attention"));
            // All that backward computes between the experts of this layer and those of the one before.
            let backward = BackwardSpan::new("attention in backward", runtime.timeline());
            let normed = rms_norm(x.clone(), block.attention_norm.val(), BackwardMark::Ends(backward.clone()));
            let heads = |linear: &Linear| {
                linear.forward(normed.clone()).reshape([sequences, length, heads, HEAD]).swap_dims(1, 2)
            };
            let attended = attention(heads(&block.query), heads(&block.key), heads(&block.value));
            let attended = attended.swap_dims(1, 2).reshape([tokens, hidden]);
            let x = x + block.output.forward(attended);
            drop(span);
            x.clone() + block.moe.forward(rms_norm(x, block.moe_norm.val(), BackwardMark::Begins(backward)))
        })
    }
}

/// Shares of the assignments. Shape `[E]`
fn skewed_shares(args: &Args) -> Vec<f64> {
    let weights: Vec<f64> = (1..=args.experts).map(|e| (e as f64).powf(-args.exponent)).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// What a rank measured.
struct Measured {
    step: Duration,
    imbalance: f64,
    imbalance_static: f64,
    moved: f64,
    /// Of all ranks to others, mean over steps.
    token_bytes: f64,
    missed: u64,
    began: f64,
    ended: f64,
}

fn run_rank(args: &Args, control: Arc<dyn Communicator>) -> Result<Measured, FsepError> {
    let rank = control.rank();
    let device = args.backend.device(rank, HalfPrecision::Bf16).map_err(FsepError::Device)?.autodiff();
    let synchronize = || device.sync().map_err(|error| FsepError::Device(error.to_string()));
    let timeline = args.timeline.is_some().then(|| Timeline::of_gpu(rank)).transpose()?;
    if let Some(timeline) = &timeline {
        timeline.set_recording(false);
    }
    let mut config = FsepRuntimeConfig::new().with_schedule(
        ScheduleConfig::new()
            .with_prefetch_forward(!args.no_prefetch_forward)
            .with_prefetch_backward(!args.no_prefetch_backward)
            .with_delay_reshard(!args.no_delay_reshard)
            .with_kept_layers(if args.no_prefetch_backward { 0 } else { args.kept_layers }),
    );
    config.timeline = timeline.clone();
    config.expert_parallel_size = args.expert_parallel_size;
    config.token_rows = args.token_rows.into();
    config.token_chunks = args.token_chunks;
    let comm: Arc<dyn Communicator> = if args.ranks == 1 {
        control
    } else {
        let mut nccl = NcclConfig::new(rank).with_check_signatures(false).with_background_ctas(args.background_ctas);
        nccl.timeline = timeline.clone();
        Arc::new(nccl.init(control)?)
    };
    let runtime = config.init(comm)?;
    let buckets = (!args.no_buckets && args.ranks > 1).then(|| GradientBuckets::new(&runtime));
    // Every rank uses every layer.
    let mut training = TrainerConfig::new().with_connect(false).with_check_gradients(false);
    training.buckets = buckets.clone();
    if runtime.groups().experts().size() > 1 && !args.static_ep {
        training = training.with_planner(PlannerConfig::new(PlannerStrategy::MinMax));
    }
    let model = Transformer::new(args, &runtime, &device)?;
    let mut trainer = training.init(&runtime, model, FusedAdamWConfig::new().init())?;
    let tokens = args.sequences * args.length;
    // Batches that differ, so that routing does.
    let batches: Vec<Tensor<2>> = (0..3)
        .map(|_| Tensor::random([tokens, args.hidden], Distribution::Normal(0.0, 1.0), &device).detach())
        .collect();

    let (mut times, mut sums) = (Times::default(), [0.0; 4]);
    let mut began = 0.0;
    for step in 0..args.warmup + args.steps {
        if step == args.warmup {
            synchronize()?;
            runtime.comm().barrier(Operation::new("start"))?;
            began = unix_seconds();
            if let Some(timeline) = &timeline {
                timeline.set_recording(true);
            }
        }
        let start = Instant::now();
        let batch = batches[step % batches.len()].clone();
        trainer.step(1e-5, |model| model.forward(batch, args.length, &runtime, buckets.as_ref()).square().mean())?;
        synchronize()?;
        if step >= args.warmup {
            times.push(start.elapsed());
            let stats = runtime.stats();
            let values =
                [stats.imbalance(), stats.imbalance_static(), stats.moved_slots() as f64, stats.token_bytes() as f64];
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value / args.steps as f64);
        }
    }
    let ended = unix_seconds();
    if let (Some(timeline), Some(path)) = (&timeline, &args.timeline) {
        timeline.set_recording(false);
        let path = path.with_extension(format!("rank{rank}.json"));
        std::fs::write(&path, timeline.chrome_trace(rank)?)
            .map_err(|error| FsepError::Config(format!("{}: {error}", path.display())))?;
        if rank == 0 {
            report_overlap(&timeline.records()?, args);
        }
    }
    if let (0, Some(path)) = (rank, &args.write_shares) {
        write_shares(&runtime, path)?;
    }
    let mut slowest = [times.median().as_secs_f64()];
    runtime.comm().all_reduce(Operation::new("time"), ReduceBuffer::F64(&mut slowest), ReduceOp::Max)?;
    let [imbalance, imbalance_static, moved, token_bytes] = sums;
    let missed = runtime.missed_prefetches();
    let step = Duration::from_secs_f64(slowest[0]);
    Ok(Measured { step, imbalance, imbalance_static, moved, token_bytes, missed, began, ended })
}

/// Each expert's share of the last step's assignments, of all layers.
fn write_shares(runtime: &FsepRuntime, path: &Path) -> Result<(), FsepError> {
    let of_layer = |layer: &LayerStats| -> Vec<f64> {
        let totals = layer.counts.expert_totals();
        totals.iter().map(|&total| total as f64 / layer.counts.total() as f64).collect()
    };
    let shares: Vec<_> = runtime.stats().layers.iter().map(of_layer).collect();
    std::fs::write(path, serde_json::json!(shares).to_string())
        .map_err(|error| FsepError::Config(format!("{}: {error}", path.display())))
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// How much of each kind of communication runs while the experts or attention compute, and how often the host waits.
fn report_overlap(records: &[TimelineRecord], args: &Args) {
    let compute: Vec<_> = records.iter().filter(|record| record.track == "compute").collect();
    let hidden = |record: &TimelineRecord| -> f64 {
        compute.iter().map(|other| (record.end.min(other.end) - record.start.max(other.start)).max(0.0)).sum()
    };
    let mut kinds = std::collections::BTreeMap::<String, (usize, f64, f64)>::new();
    for record in records.iter().filter(|record| record.track != "compute") {
        let name = record.name.split([',', '(']).next().unwrap_or_default();
        let name = name.split(" of layer").next().unwrap_or_default();
        let kind = kinds.entry(format!("{}: {}", record.track, name.trim())).or_default();
        kind.0 += 1;
        kind.1 += record.end - record.start;
        kind.2 += hidden(record);
    }
    for (kind, (count, total, hidden)) in kinds {
        let line = serde_json::json!({
            "timeline": kind, "per_step_and_layer": count as f64 / (args.steps * args.layers) as f64,
            "ms_per_step": total / 1e3 / args.steps as f64, "behind_compute": if total > 0.0 { hidden / total } else { 0.0 }
        });
        println!("{line}");
    }
}

fn main() {
    let args = Args::parse();
    if args.timeline.is_some() && args.backend != GpuBackend::Libtorch {
        eprintln!("error: a timeline times LibTorch's stream: leave --timeline out with --backend {}", args.backend);
        std::process::exit(1);
    }
    let config = LaunchConfig::new(args.ranks).with_timeout(Duration::from_secs(120));
    let mut results = Vec::new();
    for result in launch(&config, |control| run_rank(&args, control)) {
        match result {
            Ok(measured) => results.push(measured),
            Err(error) => {
                eprintln!("error: {error}");
                std::process::exit(1);
            }
        }
    }
    let Measured { step, imbalance, imbalance_static, moved, token_bytes, missed, began, ended } = &results[0];
    let tokens = (args.ranks * args.sequences * args.length) as f64;
    let line = serde_json::json!({
        "step_ms": step.as_secs_f64() * 1e3, "tokens_per_s": tokens / step.as_secs_f64(), "imbalance": imbalance,
        "imbalance_static": imbalance_static, "moved_slots": moved, "token_bytes": token_bytes, "missed_prefetches": missed,
        "began": began, "ended": ended, "steps": args.steps
    });
    println!("{line}");
}
