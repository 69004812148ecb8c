//! A whole FSEPMoE layer on one NVIDIA GPU in half precision: router to combine, forward and backward.
//!
//! Prints one line of JSON as the peers' scripts do: median time, rate of the experts' products (18 D F T K flop), peak
//! memory. `--backend` is what the layer runs on, and `--plain` takes the same layer in Burn's own operations instead.
//! `benches/gpu_layer.py` runs it beside its peers.

#![allow(deprecated)] // Burn's LibTorch backend: see burn-fsep/src/lib.rs

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use burn::tensor::{Distribution, Tensor};
use burn_fsep::{FSEPMoEConfig, FsepRuntime};
use burn_fsep_benches::{GpuBackend, HalfPrecision, PlainMoe, Times};
use clap::Parser;
use cudarc::driver::CudaContext;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 16384)]
    tokens: usize,
    #[arg(long, default_value_t = 4096)]
    hidden: usize,
    #[arg(long, default_value_t = 14336)]
    ffn: usize,
    #[arg(long, default_value_t = 8)]
    experts: usize,
    #[arg(long, default_value_t = 2)]
    topk: usize,
    #[arg(long, default_value_t = 20)]
    iters: usize,
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    #[arg(long, value_enum, default_value_t)]
    backend: GpuBackend,
    #[arg(long, value_enum, default_value_t)]
    dtype: HalfPrecision,
    /// The layer as Burn's users write it, of Burn's own operations.
    #[arg(long)]
    plain: bool,
    /// Measures memory, not time. LibTorch needs PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that what is free is what nobody uses; what
    /// CubeCL keeps for later counts.
    #[arg(long)]
    memory: bool,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    // Also before memory is measured: what a context takes of it is not counted.
    let gpu = if args.memory { Some(CudaContext::new(0).expect("there is a GPU")) } else { None };
    let at_start = gpu.as_ref().map(free_bytes);
    let device = match args.backend.device(0, args.dtype) {
        Ok(device) => device.autodiff(),
        Err(reason) => {
            eprintln!("error: {reason}");
            std::process::exit(1);
        }
    };
    let normal = || Tensor::<2>::random([args.tokens, args.hidden], Distribution::Normal(0.0, 1.0), &device);
    let grad = normal().detach();
    let x = normal().detach().require_grad();
    let config = FSEPMoEConfig::new(args.hidden, args.ffn, args.experts).with_moe_router_topk(args.topk);
    let forward: Box<dyn Fn(Tensor<2>) -> Tensor<2>> = if args.plain {
        let layer = PlainMoe::new(args.hidden, args.ffn, args.experts, args.topk, &device);
        Box::new(move |x| layer.forward(x))
    } else {
        let layer = config.init(&FsepRuntime::single(), &device);
        Box::new(move |x| layer.forward(x))
    };
    let step = || drop((forward(x.clone()) * grad.clone()).sum().backward());
    let synchronize = || device.sync().expect("the device computes");
    // Of what made the parameters nothing is left.
    step();
    synchronize();
    device.memory_cleanup();
    for _ in 0..args.warmup {
        step();
    }
    synchronize();
    let kind = if args.plain { "plain Burn" } else { "burn-fsep" };
    let peer = format!("{kind} on {}", args.backend);
    let flop = 18.0 * (args.hidden * args.ffn * args.tokens * args.topk) as f64;
    if let (Some(gpu), Some(at_start)) = (gpu, at_start) {
        let step = || {
            step();
            synchronize();
        };
        let (free, least) = (free_bytes(&gpu), least_free_while(&gpu, &step));
        // What the process has of the GPU, caches and all: what `nvidia-smi` shows.
        let taken = at_start - least;
        let peak = match args.backend {
            // Between steps only these are alive: parameters, input and gradient of the output. What is free then also lacks
            // what CUDA took for itself, which the peers' figures do not count either.
            GpuBackend::Libtorch => {
                let parameters = args.experts * (3 * args.hidden * args.ffn + args.hidden);
                let alive = 2 * (parameters + 2 * args.tokens * args.hidden);
                alive + free - least
            }
            GpuBackend::Cuda | GpuBackend::Vulkan => taken,
        };
        let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        println!("{}", serde_json::json!({"peer": peer, "peak_gib": gib(peak), "taken_gib": gib(taken)}));
        return;
    }
    let mut times = Times::default();
    for _ in 0..args.iters {
        let start = Instant::now();
        step();
        synchronize();
        times.push(start.elapsed());
    }
    let ms = times.median().as_secs_f64() * 1e3;
    println!(
        "{}",
        serde_json::json!({"peer": peer, "ms": ms, "tflops": flop / ms / 1e9, "dtype": args.dtype.to_string()})
    );
}

/// Free bytes of the GPU.
fn free_bytes(gpu: &Arc<CudaContext>) -> usize {
    gpu.mem_get_info().expect("the GPU answers").0
}

/// The least that was free during some steps.
fn least_free_while(gpu: &Arc<CudaContext>, step: &impl Fn()) -> usize {
    let done = Arc::new(AtomicBool::new(false));
    let watcher = thread::spawn({
        let (done, gpu) = (done.clone(), gpu.clone());
        move || {
            let mut least = usize::MAX;
            while !done.load(Ordering::Relaxed) {
                least = least.min(free_bytes(&gpu));
            }
            least
        }
    });
    for _ in 0..3 {
        step();
    }
    done.store(true, Ordering::Relaxed);
    watcher.join().expect("the watcher does not panic")
}
