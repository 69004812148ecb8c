use std::{path::Path, time::Instant};

use burn::tensor::Device;
use burn_fsep::{
    FsepError, FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
    hub::ModelConfig,
    launch::Rank,
    planner::{PlannerStrategy, SplitMix64},
    train::{FusedAdamWConfig, PlannerConfig, ShardedOptimizer, TrainOptimizer, TrainerConfig},
};

use crate::{
    BenchArgs, MoeHfError, TokenBatch,
    inspect::ParameterCounts,
    memory::{self, JobSizes, PeakMemory, components, gib},
    model::{CausalLm, DecoderConfig},
    ranks,
};

/// Runs `bench`, or, as a process of a launcher, one rank of it.
///
/// # Errors
///
/// [`MoeHfError`] if an option cannot work, config.json cannot be read, or a step fails.
pub fn bench(args: &BenchArgs) -> Result<(), MoeHfError> {
    args.check()?;
    let ranks = args.parallel.init(1)?;
    let config = DecoderConfig::from_hub(&ModelConfig::open(&args.config_only)?)?.with_layers(args.layers)?;
    let is_thread = ranks.environment().is_none();
    let line = ranks.run(|rank| run(args, &config, &rank, is_thread))?;
    if ranks.has_first() {
        println!("{line}");
    }
    Ok(())
}

fn run(
    args: &BenchArgs,
    config: &DecoderConfig,
    rank: &Rank,
    is_thread: bool,
) -> Result<serde_json::Value, MoeHfError> {
    ranks::check_equal(rank.comm.as_ref(), "options or models", &format!("{config:?} {args:?}"))?;
    let job = JobSizes::of_bench(args, rank.comm.size());
    let estimated = memory::check(&job, config, rank, (&args.parallel.ranks, args.memory), is_thread)?;
    let text = args.text.as_ref().map(|path| read_text(path, args.seq_len, config.vocab_size)).transpose()?;
    let memory = PeakMemory::start(rank.gpu);
    let (runtime, device) = ranks::start(rank, &args.parallel, args.seed)?;
    let device = device.autodiff();
    let config = config.clone().with_parallel(&args.parallel);
    let model = CausalLm::new(&config, args.parallel.dtype.compute(), &runtime, &device)?;
    let optimizer = FusedAdamWConfig::new().init();
    let bench = Bench { args, config: &config, text: text.as_deref(), runtime: &runtime, gpu: rank.gpu };
    let Measured { step_s, losses, imbalance, peak_gib, state_bytes } = if args.memory.sharded_optimizer {
        let optimizer = ShardedOptimizer::new(&runtime, optimizer, &model)?;
        bench.measure(model, optimizer, memory, &device, |optimizer| optimizer.state_bytes().map(Some))?
    } else {
        bench.measure(model, optimizer, memory, &device, |_| Ok(None))?
    };
    let tokens = runtime.world_size() * args.batch * args.seq_len;
    let counts = ParameterCounts::of(&config);
    let parts = components(&estimated.memory);
    let parts: serde_json::Map<_, _> =
        parts.into_iter().map(|(name, bytes)| (name.into(), gib(bytes).into())).collect();
    Ok(serde_json::json!({
        "tokens_per_s": tokens as f64 / step_s, "step_ms": step_s * 1e3,
        "peak_gib": peak_gib, "estimated_peak_gib": estimated.peak_gib(), "estimated_rank_gib": parts,
        "restored_experts_gib": gib(runtime.unsharded_gauge().peak_bytes() as u64),
        "optimizer_state_gib": state_bytes.map(|bytes| gib(bytes as u64)),
        "dtype": format!("{:?}", args.parallel.dtype).to_lowercase(), "ranks": runtime.world_size(),
        "layers": config.feed_forwards.len(), "batch": args.batch, "seq_len": args.seq_len, "steps": args.steps,
        "parameters": counts.total(), "parameters_per_token": counts.active(),
        "imbalance_static": imbalance[0], "imbalance_planned": imbalance[1],
        "first_loss": losses[0], "last_loss": losses[losses.len() - 1], "losses": losses,
    }))
}

/// What a rank measures steps with.
struct Bench<'a> {
    args: &'a BenchArgs,
    config: &'a DecoderConfig,
    text: Option<&'a [u8]>,
    runtime: &'a FsepRuntime,
    gpu: Option<usize>,
}

/// What was measured; equal on all ranks, except for the state.
struct Measured {
    step_s: f64,
    losses: Vec<f64>,
    /// Without and with the planner.
    imbalance: [f64; 2],
    peak_gib: f64,
    /// Of this rank's optimizer, if it tells.
    state_bytes: Option<usize>,
}

impl Bench<'_> {
    fn measure<O: TrainOptimizer>(
        &self,
        model: CausalLm,
        optimizer: O,
        memory: PeakMemory,
        device: &Device,
        state_bytes: impl Fn(&O) -> Result<Option<usize>, FsepError>,
    ) -> Result<Measured, MoeHfError> {
        let Self { args, config, text, runtime, gpu } = *self;
        // Every rank uses every layer. Gradients are not looked at: the peer in benches/hf_finetune_step.py does not, either.
        let mut training = TrainerConfig::new()
            .with_connect(false)
            .with_check_gradients(false)
            .with_gradient_buckets(model.buckets().clone());
        if runtime.world_size() > 1 && !args.parallel.no_planner {
            training = training.with_planner(PlannerConfig::new(PlannerStrategy::MinMax));
        }
        let mut trainer = training.init(runtime, model, optimizer)?;
        let (mut times, mut losses, mut imbalance) = (Vec::new(), Vec::new(), [0.0; 2]);
        for step in 0..args.warmup + args.steps {
            let batch = batch(args, text, config, step, runtime, device);
            runtime.comm().barrier(Operation::new("step"))?;
            let start = Instant::now();
            let done = trainer.step(1e-5, |model| model.loss(&batch, config.router_aux_loss_coef, runtime))?;
            synchronize(device, gpu)?;
            if step >= args.warmup {
                times.push(start.elapsed().as_secs_f64());
                let stats = runtime.stats();
                imbalance[0] += stats.imbalance_static() / args.steps as f64;
                imbalance[1] += stats.imbalance() / args.steps as f64;
            }
            losses.push(trainer.mean_loss(&done)?);
        }
        times.sort_unstable_by(f64::total_cmp);
        let mut slowest = [times[times.len() / 2]];
        runtime.comm().all_reduce(Operation::new("time"), ReduceBuffer::F64(&mut slowest), ReduceOp::Max)?;
        let mut peak = [memory.gib()];
        runtime.comm().all_reduce(Operation::new("memory"), ReduceBuffer::F64(&mut peak), ReduceOp::Max)?;
        // After the peak was read: this copies the state.
        let state_bytes = state_bytes(trainer.optimizer())?;
        Ok(Measured { step_s: slowest[0], losses, imbalance, peak_gib: peak[0], state_bytes })
    }
}

/// The bytes of a text.
fn read_text(path: &Path, seq_len: usize, vocab_size: usize) -> Result<Vec<u8>, MoeHfError> {
    let fail = |what: String| MoeHfError::Option(format!("--text {}: {what}", path.display()));
    let text = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
    if text.len() < seq_len {
        return Err(fail(format!("its {} bytes are fewer than the {seq_len} tokens of a sequence", text.len())));
    }
    match text.iter().find(|&&byte| usize::from(byte) >= vocab_size) {
        Some(byte) => Err(fail(format!("it has the byte {byte}, but the model has only {vocab_size} tokens"))),
        None => Ok(text),
    }
}

/// Tokens that differ from step to step and from rank to rank: random ones, or those of a text.
fn batch(
    args: &BenchArgs,
    text: Option<&[u8]>,
    config: &DecoderConfig,
    step: usize,
    runtime: &FsepRuntime,
    device: &Device,
) -> TokenBatch {
    let stream = (step * runtime.world_size() + runtime.rank()) as u64;
    let mut rng = SplitMix64::new(SplitMix64::at(args.seed, stream));
    let mut row = || match text {
        None => (0..args.seq_len).map(|_| rng.below(config.vocab_size) as u32).collect(),
        Some(text) => {
            let start = rng.below(text.len() - args.seq_len + 1);
            text[start..][..args.seq_len].iter().map(|&byte| u32::from(byte)).collect()
        }
    };
    let rows: Vec<Vec<u32>> = (0..args.batch).map(|_| row()).collect();
    TokenBatch::new(&rows, args.seq_len, device)
}

/// Waits until the device has computed all that it was given.
fn synchronize(device: &Device, gpu: Option<usize>) -> Result<(), FsepError> {
    #[cfg(feature = "libtorch")]
    if let Some(gpu) = gpu {
        tch::Cuda::synchronize(gpu as i64);
        return Ok(());
    }
    let _ = gpu;
    device.sync().map_err(|error| FsepError::Device(error.to_string()))
}
