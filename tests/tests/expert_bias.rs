//! The bias on the choice of experts, which balances loads without an auxiliary loss.

use std::{path::Path, sync::Arc};

use burn::{
    data::dataloader::DataLoaderBuilder,
    data::dataset::InMemDataset,
    module::Module,
    optim::AdamWConfig,
    tensor::{Device, Tensor, TensorData},
    train::{Learner, SupervisedTraining, TrainingStrategy},
};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    checkpoint::{self, CheckpointConfig},
    comm::local::LaunchConfig,
    learner::{FsepStrategy, SilentRenderer},
    moe::{ExpertBiasConfig, ScoreFunction, TopKRouterConfig},
    train::{GradientBucketsConfig, PlannerConfig, RankDataset, TrainerConfig},
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{SmallMoe, TaskBatch, TaskBatcher, TaskItem, device, launch, plain_device, task_items};

const EXPERTS: usize = 8;
const HIDDEN: usize = 8;
const RATE: f64 = 0.01;
const TOKENS: usize = 32;

fn config() -> FSEPMoEConfig {
    let router = TopKRouterConfig::new()
        .with_score_function(ScoreFunction::Sigmoid)
        .with_expert_bias(Some(ExpertBiasConfig::new().with_update_rate(RATE)));
    FSEPMoEConfig::new(HIDDEN, 10, EXPERTS).with_router(router)
}

#[derive(Module, Debug)]
struct Model {
    moe: FSEPMoE,
}

impl Model {
    fn new(runtime: &FsepRuntime) -> Self {
        Self { moe: config().init(runtime, &device()) }
    }

    fn bias(&self) -> Vec<f32> {
        self.moe.router.expert_bias.as_ref().expect("the router has one").val().into_data().iter().collect()
    }

    /// The rank's part of a batch of `TOKENS` tokens, which lie on one side, so that some experts get most of them.
    fn loss(&self, batch: usize, device: &Device) -> Tensor<1> {
        let runtime = self.moe.runtime();
        let rows = TOKENS / runtime.world_size();
        let first = runtime.rank() * rows * HIDDEN;
        let value = |i: usize| 1.0 + ((batch * TOKENS * HIDDEN + i) as f32 * 0.37).sin();
        let values: Vec<f32> = (first..first + rows * HIDDEN).map(value).collect();
        let x = Tensor::<2>::from_data(TensorData::new(values, [rows, HIDDEN]), device);
        self.moe.forward(x).square().mean()
    }
}

/// What the bias should be after these batches' loads. `[steps][E]`
fn expected(steps: &[Vec<u64>]) -> Vec<f32> {
    let mut bias = vec![0.0f32; EXPERTS];
    for loads in steps {
        let mean = loads.iter().sum::<u64>() as f64 / EXPERTS as f64;
        for (bias, &load) in bias.iter_mut().zip(loads) {
            *bias += match (load as f64).total_cmp(&mean) {
                std::cmp::Ordering::Less => RATE as f32,
                std::cmp::Ordering::Equal => 0.0,
                std::cmp::Ordering::Greater => -RATE as f32,
            };
        }
    }
    bias
}

/// Loads of each batch, and the bias at the end.
fn train(runtime: &FsepRuntime, accumulation: usize, batches: usize) -> Result<(Vec<Vec<u64>>, Vec<f32>), FsepError> {
    let device = device();
    // Weight decay would shrink a bias that the optimizer sees.
    let optimizer = AdamWConfig::new().with_weight_decay(0.5).init();
    let buckets = GradientBucketsConfig::new().with_bucket_bytes(200).init(runtime);
    let planner = PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true);
    let config = TrainerConfig::new().with_accumulation_steps(accumulation).with_gradient_buckets(buckets.clone());
    let mut trainer = config.with_planner(planner).init(runtime, Model::new(runtime), optimizer)?;
    let mut loads = Vec::new();
    for batch in 0..batches {
        trainer
            .step(0.05, |model| buckets.prepare(model, &Tensor::<2>::zeros([1, 1], &device)).loss(batch, &device))?;
        loads.push(runtime.stats().layers[0].counts.expert_totals());
        // Looks at the model between steps, with gradients and without: no part of the batch.
        runtime.run(|| trainer.model().loss(batch + 100, &device))?;
        runtime.run(|| trainer.model().clone().valid().loss(batch + 200, &plain_device()))?;
    }
    let model = trainer.finish()?;
    Ok((loads, model.bias()))
}

#[test]
fn it_moves_by_the_whole_batchs_loads_once_a_step() {
    let one = train(&FsepRuntime::single(), 1, 6).unwrap();
    assert_eq!(one.1, expected(&one.0));
    assert!(one.1.iter().any(|&b| b > 0.0) && one.1.iter().any(|&b| b < 0.0), "{one:?}");
    for ranks in [2, 4] {
        let results = launch(&LaunchConfig::new(ranks), |comm| train(&FsepRuntime::new(comm)?, 1, 6));
        for result in results {
            assert_eq!(result.unwrap().1, one.1, "{ranks} ranks");
        }
    }
}

#[test]
fn it_moves_once_a_window() {
    let (loads, bias) = train(&FsepRuntime::single(), 3, 6).unwrap();
    let windows: Vec<Vec<u64>> = loads
        .chunks(3)
        .map(|window| (0..EXPERTS).map(|e| window.iter().map(|loads| loads[e]).sum()).collect())
        .collect();
    assert_eq!(bias, expected(&windows));
}

#[test]
fn a_discarded_window_moves_nothing() {
    let (runtime, device) = (FsepRuntime::single(), device());
    let config = TrainerConfig::new().with_accumulation_steps(2);
    let mut trainer = config.init(&runtime, Model::new(&runtime), AdamWConfig::new().init()).unwrap();
    trainer.step(0.0, |model| model.loss(0, &device)).unwrap();
    trainer.discard_window().unwrap();
    let mut window = vec![0; EXPERTS];
    for batch in [1, 2] {
        trainer.step(0.0, |model| model.loss(batch, &device)).unwrap();
        let loads = runtime.stats().layers[0].counts.expert_totals();
        window.iter_mut().zip(loads).for_each(|(sum, load)| *sum += load);
    }
    assert_eq!(trainer.model().bias(), expected(&[window]));
}

/// It counts nothing, so that its bias stays.
#[test]
fn a_dense_layer_trains_too() {
    let (runtime, device) = (FsepRuntime::single(), device());
    let layer = config().init_dense(0, 0, &device).unwrap();
    let mut trainer = TrainerConfig::new().init(&runtime, layer, AdamWConfig::new().init()).unwrap();
    let x = Tensor::<2>::ones([4, HIDDEN], &device);
    trainer.step(0.1, |layer| layer.forward(x.clone()).square().mean()).unwrap();
    let bias = trainer.model().router.expert_bias.as_ref().unwrap().val();
    assert!(bias.into_data().iter::<f32>().all(|bias| bias == 0.0));
}

/// A skewed router becomes even by nothing but its bias.
#[test]
fn loads_become_even() {
    let (runtime, device) = (FsepRuntime::single(), device());
    let mut trainer = TrainerConfig::new().init(&runtime, Model::new(&runtime), AdamWConfig::new().init()).unwrap();
    let mut imbalances = Vec::new();
    for _ in 0..80 {
        trainer.step(0.0, |model| model.loss(0, &device)).unwrap();
        let loads = runtime.stats().layers[0].counts.expert_totals();
        let mean = loads.iter().sum::<u64>() as f64 / EXPERTS as f64;
        imbalances.push(loads.into_iter().max().unwrap() as f64 / mean);
    }
    let (first, last) = (imbalances[0], imbalances[70..].iter().sum::<f64>() / 10.0);
    assert!(first > 3.0 && last < 1.5, "{imbalances:?}");
}

#[test]
fn checkpoints_have_it() {
    let folder = tempfile::tempdir().unwrap();
    let save = |ranks: usize, path: &Path| {
        let biases = launch(&LaunchConfig::new(ranks), |comm| {
            let (runtime, device) = (FsepRuntime::new(comm)?, device());
            let config = TrainerConfig::new().with_checkpoints(CheckpointConfig::new(path));
            let mut trainer = config.init(&runtime, Model::new(&runtime), AdamWConfig::new().init())?;
            for batch in 0..3 {
                trainer.step(0.01, |model| model.loss(batch, &device))?;
            }
            trainer.save()?;
            Ok::<_, FsepError>(trainer.finish()?.bias())
        });
        biases.into_iter().map(Result::unwrap).next().unwrap()
    };
    let bias = save(2, folder.path());
    assert!(bias.iter().any(|&b| b != 0.0));
    let newest = checkpoint::list(folder.path()).unwrap().pop().unwrap();
    let runtime = FsepRuntime::single();
    let loaded = checkpoint::load(&newest, &runtime, &Model::new(&runtime), &AdamWConfig::new().init()).unwrap();
    assert_eq!(loaded.model.bias(), bias);
    assert!(!loaded.model.moe.router.expert_bias.as_ref().unwrap().val().is_require_grad());
}

#[test]
fn the_learner_moves_it_too() {
    let folder = tempfile::tempdir().unwrap();
    let items = task_items(6 * 16, 1);
    let biases = launch(&LaunchConfig::new(2), |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let model = SmallMoe::fsep_of(&config(), &runtime, &device())?;
        let part = RankDataset::new(InMemDataset::new(items.clone()), 16, &runtime)?;
        let size = part.batch_size();
        let loader = |part| DataLoaderBuilder::<TaskItem, TaskBatch>::new(TaskBatcher).batch_size(size).build(part);
        let validation = RankDataset::new(InMemDataset::new(items[..16].to_vec()), 16, &runtime)?;
        let strategy = Arc::new(FsepStrategy::new(runtime.clone(), plain_device()));
        let artifacts = folder.path().join(format!("rank-{}", runtime.rank()));
        let result = SupervisedTraining::new(artifacts, loader(part), loader(validation))
            .num_epochs(1)
            .with_application_logger(None)
            .renderer(Box::new(SilentRenderer))
            .with_training_strategy(TrainingStrategy::Custom(strategy))
            .launch(Learner::new(model, AdamWConfig::new().init(), 1e-2));
        assert!(result.error.is_none(), "{:?}", result.error);
        Ok::<_, FsepError>(result.model.expert_biases())
    });
    let biases: Vec<_> = biases.into_iter().map(Result::unwrap).collect();
    assert_eq!(biases[0], biases[1]);
    // Six steps, in each of which a bias moves by the rate, or stays where its expert got just the mean.
    for bias in &biases[0] {
        let moves = bias.iter().map(|b| f64::from(*b) / RATE);
        assert!(moves.clone().all(|moves| moves.abs() < 6.001 && (moves - moves.round()).abs() < 1e-3), "{bias:?}");
        assert!(moves.clone().any(|moves| moves.round() != 0.0), "{bias:?}");
    }
}
