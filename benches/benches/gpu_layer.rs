//! A whole FSEPMoE layer on one NVIDIA GPU in bf16: router to combine, forward and backward.
//!
//! Prints one line of JSON as the peers' scripts do: median time, rate of the experts' products (18 D F T K flop), peak
//! memory. `benches/gpu_layer.py` runs it beside its peers.

#![allow(deprecated)] // Burn's LibTorch backend: see burn-fsep/src/lib.rs

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use burn::tensor::{Device, Distribution, FloatDType, IntDType, Tensor};
use burn_fsep::{FSEPMoEConfig, FsepRuntime};
use burn_fsep_benches::Times;
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
    /// Measures memory, not time: needs PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that what is free is what nobody uses.
    #[arg(long)]
    memory: bool,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    if !tch::Cuda::is_available() {
        eprintln!("error: LibTorch sees no GPU; see the README for how to build with CUDA");
        std::process::exit(1);
    }
    let mut device = Device::libtorch_cuda(0);
    device.configure((FloatDType::BF16, IntDType::I64)).expect("the device was not used before");
    let device = device.autodiff();
    let config = FSEPMoEConfig::new(args.hidden, args.ffn, args.experts).with_moe_router_topk(args.topk);
    let layer = config.init(&FsepRuntime::single(), &device);
    let normal = || Tensor::<2>::random([args.tokens, args.hidden], Distribution::Normal(0.0, 1.0), &device);
    let grad = normal().detach();
    let x = normal().detach().require_grad();
    let step = || {
        let output = layer.forward(x.clone());
        drop((output * grad.clone()).sum().backward());
    };
    for _ in 0..3 {
        step();
    }
    tch::Cuda::synchronize(0);
    let flop = 18.0 * (args.hidden * args.ffn * args.tokens * args.topk) as f64;
    if args.memory {
        let gpu = CudaContext::new(0).expect("LibTorch sees a GPU");
        // Between steps only these are alive: parameters, input and gradient of the output. What is free then also lacks
        // what CUDA took for itself, which the peers' figures do not count either.
        let parameters = args.experts * (3 * args.hidden * args.ffn + args.hidden);
        let alive = 2 * (parameters + 2 * args.tokens * args.hidden);
        let idle = free_bytes(&gpu);
        let least = least_free_while(&gpu, &step);
        println!(
            "{}",
            serde_json::json!({"peer": "burn-fsep", "peak_gib": (alive + idle - least) as f64 / (1u64 << 30) as f64})
        );
        return;
    }
    let mut times = Times::default();
    for _ in 0..args.iters {
        let start = Instant::now();
        step();
        tch::Cuda::synchronize(0);
        times.push(start.elapsed());
    }
    let ms = times.median().as_secs_f64() * 1e3;
    println!("{}", serde_json::json!({"peer": "burn-fsep", "ms": ms, "tflops": flop / ms / 1e9}));
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
        tch::Cuda::synchronize(0);
    }
    done.store(true, Ordering::Relaxed);
    watcher.join().expect("the watcher does not panic")
}
