//! A training step with the optimizer's state whole on every rank and cut over ranks, in turns.
//! `cargo bench -p burn-fsep-benches --bench sharded_optimizer`

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    optim::AdamWConfig,
    tensor::{Device, Distribution, Tensor},
};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    comm::{
        Operation,
        local::{LaunchConfig, launch},
    },
    train::{ShardedOptimizer, TrainOptimizer, Trainer, TrainerConfig},
};
use burn_fsep_benches::{Times, report};

const HIDDEN: usize = 256;
const LAYERS: usize = 6;
const ROUNDS: usize = 21;

fn device() -> Device {
    Device::flex().autodiff()
}

/// Dense layers, most of the parameters, and one of experts.
#[derive(Module, Debug)]
struct Model {
    up: Vec<Linear>,
    down: Vec<Linear>,
    moe: FSEPMoE,
}

impl Model {
    fn new(runtime: &FsepRuntime) -> Result<Self, FsepError> {
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).init(&device());
        Ok(Self {
            up: (0..LAYERS).map(|_| linear(HIDDEN, 4 * HIDDEN)).collect(),
            down: (0..LAYERS).map(|_| linear(4 * HIDDEN, HIDDEN)).collect(),
            moe: FSEPMoEConfig::new(HIDDEN, HIDDEN, 8).try_init(runtime, &device())?,
        })
    }

    fn loss(&self, x: &Tensor<2>) -> Tensor<1> {
        let mut hidden = x.clone();
        for (up, down) in self.up.iter().zip(&self.down) {
            hidden = hidden.clone() + down.forward(up.forward(hidden).tanh()) * 0.1;
        }
        (hidden.clone() + self.moe.forward(hidden)).square().mean()
    }
}

fn main() {
    println!(
        "a step of {LAYERS} dense layers and one of experts, D={HIDDEN}, AdamW, f32, state whole and cut over ranks"
    );
    println!("median of {ROUNDS} rounds in which the competitors take turns\n");
    for (ranks, tokens) in [(2, 128), (2, 1024), (4, 128)] {
        compare(ranks, tokens);
    }
}

fn compare(ranks: usize, tokens: usize) {
    let times = Mutex::new([Times::default(), Times::default()]);
    let bytes = Mutex::new(0);
    let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread can be started");
        pool.install(|| {
            let optimizer = || AdamWConfig::new().init();
            let (model, sharded) = (Model::new(&runtime)?, Model::new(&runtime)?);
            let mut whole = TrainerConfig::new().init(&runtime, model, optimizer())?;
            let cut = ShardedOptimizer::new(&runtime, optimizer(), &sharded)?;
            let mut cut = TrainerConfig::new().init(&runtime, sharded, cut)?;
            for round in 0..ROUNDS + 3 {
                let x = Tensor::<2>::random([tokens, HIDDEN], Distribution::Normal(0.0, 1.0), &device());
                let pair = [step(&runtime, &mut whole, &x)?, step(&runtime, &mut cut, &x)?];
                if round > 2 && runtime.rank() == 0 {
                    let mut times = times.lock().expect("no rank panicked");
                    times.iter_mut().zip(pair).for_each(|(times, time)| times.push(time));
                }
            }
            *bytes.lock().expect("no rank panicked") = cut.optimizer().state_bytes()?;
            Ok(())
        })
    });
    results.into_iter().for_each(|result| result.expect("ranks succeed"));
    let [whole, cut] = times.into_inner().expect("no rank panicked").map(|times| times.median());
    let bytes = bytes.into_inner().expect("no rank panicked") >> 10;
    println!("{ranks} ranks, {tokens} tokens each: whole {whole:.1?}, cut {cut:.1?}, a rank's state then {bytes} KiB");
    let ratio = cut.as_secs_f64() / whole.as_secs_f64();
    report("time of a step with the state cut / whole", ratio, "<= 1.02x", ratio <= 1.02);
}

/// A step of all ranks, from the first to start to the last to end.
fn step<O: TrainOptimizer>(
    runtime: &FsepRuntime,
    trainer: &mut Trainer<Model, O>,
    x: &Tensor<2>,
) -> Result<Duration, FsepError> {
    runtime.comm().barrier(Operation::new("start"))?;
    let start = Instant::now();
    trainer.step(1e-3, |model| model.loss(x))?;
    runtime.comm().barrier(Operation::new("end"))?;
    Ok(start.elapsed())
}
