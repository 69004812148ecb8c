//! One MoE layer, forward and backward: FSEP on one rank against the dense layer, and FSEP on two ranks against static
//! expert parallelism under skewed routing. `cargo bench -p burn-fsep-benches`

use std::{sync::Mutex, time::Instant};

use burn::tensor::{Device, Distribution, Tensor};
use burn_fsep::{
    ExpertParallelism, FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    comm::{
        Operation,
        local::{LaunchConfig, launch},
    },
    moe::RouterForcing,
    train::{PlannerConfig, TrainingCallback},
};
use burn_fsep_benches::{Times, report};
use burn_fsep_planner::PlannerStrategy;

const HIDDEN: usize = 256;
const FFN: usize = 512;
const EXPERTS: usize = 8;
const TOKENS: usize = 2048;
const ROUNDS: usize = 15;

fn device() -> Device {
    Device::flex().autodiff()
}

fn input() -> Tensor<2> {
    Tensor::<2>::random([TOKENS, HIDDEN], Distribution::Normal(0.0, 1.0), &device()).require_grad()
}

fn main() {
    println!("one MoE layer, forward + backward, f32, {TOKENS} tokens a rank, D={HIDDEN} F={FFN} E={EXPERTS} K=2");
    println!("median of {ROUNDS} rounds in which the competitors take turns\n");
    one_rank_against_dense();
    two_ranks_against_static();
}

fn one_rank_against_dense() {
    let config = FSEPMoEConfig::new(HIDDEN, FFN, EXPERTS);
    let runtime = FsepRuntime::single();
    let fsep = config.init(&runtime, &device());
    let dense = config.init_dense(0, 0, &device()).expect("the configuration is possible");
    let (mut fsep_times, mut dense_times) = (Times::default(), Times::default());
    for round in 0..=ROUNDS {
        let x = input();
        let start = Instant::now();
        let _ = fsep.forward(x.clone()).sum().backward();
        let fsep_time = start.elapsed();
        let start = Instant::now();
        let _ = dense.forward(x).sum().backward();
        let dense_time = start.elapsed();
        if round > 0 {
            fsep_times.push(fsep_time);
            dense_times.push(dense_time);
        }
    }
    let (fsep, dense) = (fsep_times.median(), dense_times.median());
    println!("dense layer {dense:.1?}, FSEP on one rank {fsep:.1?}");
    let ratio = fsep.as_secs_f64() / dense.as_secs_f64();
    report("time of FSEP on one rank / dense layer", ratio, "<= 1.10x", ratio <= 1.10);
}

/// Four fifths of the assignments go to the experts that static expert parallelism puts on the first rank.
fn skewed(parallelism: ExpertParallelism) -> FSEPMoEConfig {
    let half = EXPERTS / 2;
    let share = |expert: usize| if expert < half { 0.8 / half as f64 } else { 0.2 / half as f64 };
    FSEPMoEConfig::new(HIDDEN, FFN, EXPERTS)
        .with_expert_parallelism(parallelism)
        .with_moe_router_force(Some(RouterForcing::Shares((0..EXPERTS).map(share).collect())))
}

fn two_ranks_against_static() {
    let times = Mutex::new((Times::default(), Times::default()));
    let imbalance = Mutex::new((0.0, 0.0));
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        // A pool of one thread a rank: in a shared one the idle rank's core would help the busy rank.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread can be started");
        pool.install(|| {
            let fixed = skewed(ExpertParallelism::Static).try_init(&runtime, &device())?;
            let fsep = skewed(ExpertParallelism::Fsep).try_init(&runtime, &device())?;
            let mut planner = PlannerConfig::new(PlannerStrategy::MinMax).init();
            planner.on_train_start(&runtime)?;
            for round in 0..=ROUNDS + 1 {
                let x = input();
                let fixed_time = step(&runtime, &fixed, &x)?;
                let fsep_time = step(&runtime, &fsep, &x)?;
                planner.step(&runtime)?;
                if round > 1 && runtime.rank() == 0 {
                    let mut times = times.lock().expect("no rank panicked");
                    times.0.push(fixed_time);
                    times.1.push(fsep_time);
                }
            }
            let stats = runtime.stats();
            *imbalance.lock().expect("no rank panicked") = (stats.layers[0].imbalance, stats.layers[1].imbalance);
            Ok(())
        })
    });
    for result in results {
        result.expect("ranks succeed");
    }
    let (fixed, fsep) = times.into_inner().expect("no rank panicked");
    let (fixed, fsep) = (fixed.median(), fsep.median());
    let (before, after) = imbalance.into_inner().expect("no rank panicked");
    println!("\ntwo ranks with one core each, 80 % of the tokens to the first rank's experts");
    println!("static EP {fixed:.1?} (max/mean {before:.2}), FSEP {fsep:.1?} (max/mean {after:.2})");
    let ratio = fixed.as_secs_f64() / fsep.as_secs_f64();
    report("speed of FSEP on two ranks / static EP with resident experts", ratio, ">= 1.30x", ratio >= 1.30);
}

/// A step of all ranks, from the first to start to the last to end.
fn step(runtime: &FsepRuntime, layer: &FSEPMoE, x: &Tensor<2>) -> Result<std::time::Duration, FsepError> {
    runtime.comm().barrier(Operation::new("start"))?;
    let start = Instant::now();
    let grads = runtime.run(|| layer.forward(x.clone()).sum().backward())?;
    runtime.comm().barrier(Operation::new("end"))?;
    drop(grads);
    Ok(start.elapsed())
}
