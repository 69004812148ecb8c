//! Muon for experts: steps are those of the dense model whose matrices are stepped one by one, checkpoints go on with any number of ranks
//! and groups, and what cannot be stepped or saved is refused.

use std::{fs, path::Path, time::Duration};

use burn::{
    data::dataloader::batcher::Batcher,
    lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    module::ParamGroup,
    optim::{
        AdafactorConfig, AdamWConfig, GradientsParams, LambConfig, ModuleOptimizer, MuonConfig, SgdConfig,
        momentum::MomentumConfig,
    },
};
use burn_fsep::{
    ExpertParallelism, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    checkpoint::{self, CheckpointError, CheckpointedOptimizer, TrainingProgress, list},
    comm::local::LaunchConfig,
    train::{TrainOptimizer, Trainer, TrainerConfig, WholeMatrixOptimizer, clip_grad_norm, sync_gradients},
};
use burn_fsep_tests::{
    DenseMatrices, SmallMoe, TaskBatch, TaskBatcher, TaskItem, device, launch, launch_runtimes, parameter_rows,
    task_items,
};

const SEED: u64 = 3;
const BATCH: usize = 24;
const LR: f64 = 2e-3;
const CLIP: f64 = 0.5;
const EXPERTS: usize = 6;
const HIDDEN: usize = 7;
const FFN: usize = 11;
const PARAMS: usize = 3 * HIDDEN * FFN;

/// Six experts of 231 parameters: four ranks divide neither.
fn config() -> FSEPMoEConfig {
    FSEPMoEConfig::new(HIDDEN, FFN, EXPERTS).with_slots_per_rank(Some(EXPERTS))
}

fn on_ranks<T: Send>(
    (world, shared_by): (usize, usize),
    program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync,
) -> Vec<T> {
    let launched = LaunchConfig::new(world).with_timeout(Duration::from_secs(60));
    let config = FsepRuntimeConfig::new().with_seed(SEED).with_expert_parallel_size(shared_by);
    launch_runtimes(&launched, &config, program)
}

type MakeOptimizer = fn() -> ModuleOptimizer;

fn adamw() -> AdamWConfig {
    AdamWConfig::new().with_epsilon(1e-6).with_weight_decay(0.01)
}

/// Muon for the experts, AdamW for everything else.
fn muon_for_experts() -> ModuleOptimizer {
    let adamw = ModuleOptimizer::from(adamw().build());
    adamw.with_group(ParamGroup::from_predicate("experts.weight"), MuonConfig::new().build(), None)
}

/// The experts of a group, whole, from those of its ranks: `[layers, E, P]`.
fn whole(ranks: &[Vec<Vec<Vec<f32>>>]) -> Vec<Vec<Vec<f32>>> {
    let expert = |layer: usize, expert: usize| {
        let mut params: Vec<f32> = ranks.iter().flat_map(|rank| rank[layer][expert].clone()).collect();
        assert!(params[PARAMS..].iter().all(|&padding| padding == 0.0), "padding stays zero");
        params.truncate(PARAMS);
        params
    };
    (0..ranks[0].len()).map(|layer| (0..EXPERTS).map(|e| expert(layer, e)).collect()).collect()
}

fn batch(items: &[TaskItem], step: usize, [rank, ranks]: [usize; 2]) -> TaskBatch {
    let share = BATCH / ranks;
    let start = step * BATCH % items.len() + rank * share;
    TaskBatcher.batch(items[start..start + share].to_vec(), &device())
}

fn of(runtime: &FsepRuntime) -> [usize; 2] {
    [runtime.rank(), runtime.world_size()]
}

/// What a rank has after training: losses, its experts, and the replicated parameters.
type Trained = (Vec<f64>, Vec<Vec<Vec<f32>>>, Vec<f32>);

fn train<O: TrainOptimizer>(
    trainer: &mut Trainer<SmallMoe, O>,
    runtime: &FsepRuntime,
    items: &[TaskItem],
    steps: usize,
) -> Result<Trained, FsepError> {
    let mut losses = Vec::new();
    for _ in 0..steps {
        let batch = batch(items, trainer.progress().step as usize, of(runtime));
        let step = trainer.step(LR, |model| model.loss(&batch))?;
        losses.push(trainer.mean_loss(&step)?);
    }
    Ok((losses, parameter_rows(trainer.model(), "experts.weight"), trainer.model().replicated()))
}

fn trainer<O: TrainOptimizer>(
    runtime: &FsepRuntime,
    config: &FSEPMoEConfig,
    optimizer: impl FnOnce(&SmallMoe) -> Result<O, FsepError>,
) -> Result<Trainer<SmallMoe, O>, FsepError> {
    let model = SmallMoe::fsep_of(config, runtime, &device())?;
    let optimizer = optimizer(&model)?;
    TrainerConfig::new().with_max_grad_norm(CLIP).init(runtime, model, optimizer)
}

/// The golden reference: one rank, the dense model, its matrices stepped by one optimizer and everything else by another.
fn dense(items: &[TaskItem], steps: usize, matrices: MakeOptimizer, rest: MakeOptimizer) -> Trained {
    let mut model = SmallMoe::dense_of(&config(), SEED, &device()).unwrap();
    let (mut matrices, mut optimizer) = (DenseMatrices::new(matrices(), [HIDDEN, FFN]), rest());
    let mut losses = Vec::new();
    for step in 0..steps {
        let loss = model.loss(&batch(items, step, [0, 1]));
        losses.push(f64::from(loss.clone().into_scalar::<f32>()));
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        clip_grad_norm(&FsepRuntime::single(), &model, &mut grads, CLIP).unwrap();
        model = matrices.step(LR, model, &mut grads);
        model = optimizer.step(LR, model, grads);
    }
    (losses, parameter_rows(&model, "Dense.weight"), model.replicated())
}

fn largest_difference<'a>(a: impl IntoIterator<Item = &'a f32>, b: impl IntoIterator<Item = &'a f32>) -> f32 {
    a.into_iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

const STEPS: usize = 100;

#[test]
fn a_hundred_steps_are_those_of_the_dense_model_matrix_by_matrix() {
    let items = task_items(STEPS * BATCH, 1);
    let muon: MakeOptimizer = || MuonConfig::new().init();
    let adamw_for_all: MakeOptimizer = || adamw().init();
    let cases: [(&str, MakeOptimizer, MakeOptimizer, MakeOptimizer); 4] = [
        ("Muon for experts", muon_for_experts, muon, adamw_for_all),
        ("Muon for all matrices", muon, muon, muon),
        ("LAMB for all", || LambConfig::new().init(), || LambConfig::new().init(), || LambConfig::new().init()),
        ("AdamW for all", adamw_for_all, adamw_for_all, adamw_for_all),
    ];
    for (case, (name, optimizer, matrices, rest)) in cases.into_iter().enumerate() {
        let expected = dense(&items, STEPS, matrices, rest);
        assert!(expected.0[STEPS - 1] < 0.9 * expected.0[0], "{name}: {:?}", expected.0);
        let all = [(4, 4), (8, 4), (1, 1), (2, 2), (8, 8), (8, 2), (4, 1)];
        for &(world, shared_by) in if case == 0 { &all[..] } else { &all[..2] } {
            let trained = on_ranks((world, shared_by), |runtime| {
                let mut trainer =
                    trainer(runtime, &config(), |model| WholeMatrixOptimizer::new(runtime, optimizer(), model))?;
                train(&mut trainer, runtime, &items, STEPS)
            });
            let what = format!("{name}, {world} ranks in groups of {shared_by}");
            for (step, (ours, dense)) in trained[0].0.iter().zip(&expected.0).enumerate() {
                assert!((ours - dense).abs() / dense <= 1e-4, "{what}, step {step}: {ours} instead of {dense}");
            }
            let mut worst = largest_difference(&trained[0].2, &expected.2);
            for group in trained.chunks(shared_by) {
                let experts = whole(&group.iter().map(|rank| rank.1.clone()).collect::<Vec<_>>());
                let [ours, dense] = [&experts, &expected.1].map(|layers| layers.iter().flatten().flatten());
                worst = worst.max(largest_difference(ours, dense));
                assert_eq!(group[0].1, trained[0].1, "{what}: groups have the same shards");
            }
            println!("{what}: values within {worst:e}");
            assert!(worst <= 1e-5, "{what}: {worst}");
        }
    }
}

/// Whole experts with fixed owners, and biases beside the matrices.
#[test]
fn an_optimizer_that_works_element_by_element_makes_the_same_steps_bit_for_bit() {
    let items = task_items(20 * BATCH, 2);
    let is_static = config().with_expert_parallelism(ExpertParallelism::Static).with_slots_per_rank(None);
    for (config, world, shared_by) in [
        (config(), 4, 4),
        (config().with_add_bias_linear(true), 3, 3),
        (config().with_add_bias_linear(true), 4, 2),
        (is_static, 2, 2),
    ] {
        let plain = on_ranks((world, shared_by), |runtime| {
            let mut trainer = trainer(runtime, &config, |_| Ok(adamw().init()))?;
            train(&mut trainer, runtime, &items, 20)
        });
        let whole = on_ranks((world, shared_by), |runtime| {
            let mut trainer =
                trainer(runtime, &config, |model| WholeMatrixOptimizer::new(runtime, adamw().init(), model))?;
            train(&mut trainer, runtime, &items, 20)
        });
        assert_eq!(whole, plain, "{world} ranks in groups of {shared_by}");
    }
}

/// What was saved, and what came of going on.
fn save<O: TrainOptimizer>(
    runtime: &FsepRuntime,
    folder: &Path,
    optimizer: impl FnOnce(&SmallMoe) -> Result<O, FsepError>,
) -> Result<Trained, FsepError> {
    let items = task_items(40 * BATCH, 5);
    let mut trainer = trainer(runtime, &config(), optimizer)?;
    train(&mut trainer, runtime, &items, 6)?;
    checkpoint::save(folder, runtime, trainer.model(), trainer.optimizer(), trainer.progress())?;
    train(&mut trainer, runtime, &items, 20)
}

fn load<O: TrainOptimizer>(
    runtime: &FsepRuntime,
    path: &Path,
    optimizer: impl FnOnce(&SmallMoe) -> Result<O, FsepError>,
) -> Result<Trained, FsepError> {
    let items = task_items(40 * BATCH, 5);
    let model = SmallMoe::fsep_of(&config(), runtime, &device())?;
    let optimizer = optimizer(&model)?;
    let loaded = checkpoint::load(path, runtime, &model, &optimizer)?;
    let config = TrainerConfig::new().with_max_grad_norm(CLIP).with_start(loaded.progress);
    train(&mut config.init(runtime, loaded.model, loaded.optimizer)?, runtime, &items, 20)
}

fn newest(folder: &Path) -> std::path::PathBuf {
    list(folder).unwrap().pop().unwrap()
}

#[test]
fn any_ranks_and_groups_go_on_from_any_others() {
    let worlds = [(1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (4, 2), (8, 2)];
    for saving in worlds {
        let folder = tempfile::tempdir().unwrap();
        let wrapped =
            |runtime: &FsepRuntime, model: &SmallMoe| WholeMatrixOptimizer::new(runtime, muon_for_experts(), model);
        let saved = on_ranks(saving, |runtime| save(runtime, folder.path(), |model| wrapped(runtime, model)));
        let path = newest(folder.path());
        for loading in worlds {
            let resumed = on_ranks(loading, |runtime| load(runtime, &path, |model| wrapped(runtime, model)));
            if loading == saving {
                assert_eq!(resumed, saved, "{saving:?}: bit for bit");
            }
            for (step, (ours, expected)) in resumed[0].0.iter().zip(&saved[0].0).enumerate() {
                let error = (ours - expected).abs() / expected;
                assert!(error <= 1e-5, "{saving:?} to {loading:?}, step {step}: {ours} instead of {expected}");
            }
        }
    }
}

#[test]
fn files_are_those_of_an_optimizer_that_works_element_by_element() {
    for ranks in [(1, 1), (4, 4), (8, 8), (4, 2)] {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let plain = on_ranks(ranks, |runtime| save(runtime, folders[0].path(), |_| Ok(adamw().init())));
        let whole = |runtime: &FsepRuntime, model: &SmallMoe| WholeMatrixOptimizer::new(runtime, adamw().init(), model);
        let saved = on_ranks(ranks, |runtime| save(runtime, folders[1].path(), |model| whole(runtime, model)));
        assert_eq!(plain, saved);
        let [plain_path, path] = folders.each_ref().map(|folder| newest(folder.path()));
        for file in fs::read_dir(&plain_path).unwrap() {
            let name = file.unwrap().file_name();
            let [plain, whole] = [&plain_path, &path].map(|path| fs::read(path.join(&name)).unwrap());
            assert!(plain == whole, "{ranks:?}: {name:?} is another file");
        }
        assert_eq!(on_ranks(ranks, |runtime| load(runtime, &path, |_| Ok(adamw().init()))), saved);
        assert_eq!(on_ranks(ranks, |runtime| load(runtime, &plain_path, |model| whole(runtime, model))), saved);
    }
}

#[test]
fn state_of_another_optimizer_is_not_loaded() {
    let folder = tempfile::tempdir().unwrap();
    on_ranks((2, 2), |runtime| save(runtime, folder.path(), |_| Ok(adamw().init())));
    let path = newest(folder.path());
    for ranks in [(2, 2), (8, 8)] {
        on_ranks(ranks, |runtime| {
            let model = SmallMoe::fsep_of(&config(), runtime, &device())?;
            let optimizer = WholeMatrixOptimizer::new(runtime, muon_for_experts(), &model)?;
            let error = checkpoint::load(&path, runtime, &model, &optimizer).unwrap_err();
            // The last two of eight ranks have none of six experts, and learn it from the others.
            match &error {
                CheckpointError::Optimizer { parameter, .. } => {
                    assert!(parameter.ends_with("experts.weight"), "{error}")
                }
                other => assert!(matches!(other, CheckpointError::Peer { .. }) && runtime.rank() >= 6, "{other}"),
            }
            Ok(())
        });
    }
}

#[test]
fn learning_rates_by_module_reach_experts() {
    on_ranks((2, 2), |runtime| {
        let model = SmallMoe::fsep_of(&config(), runtime, &device())?;
        let mut optimizer = WholeMatrixOptimizer::new(runtime, muon_for_experts(), &model)?;
        let loss = model.loss(&batch(&task_items(BATCH, 1), 0, of(runtime)));
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        sync_gradients(runtime, &model, &mut grads)?;
        let (experts, rest) = (parameter_rows(&model, "experts.weight"), model.replicated());
        let frozen = burn::lr_scheduler::module_lr_scheduler::ModuleLrSchedulerConfig::new(1e-2.into())
            .with_group(ParamGroup::from_predicate("experts"), 0.0);
        let lr: ModuleLearningRate = frozen.init().unwrap().step();
        let model = optimizer.step(lr, model, grads)?;
        assert_eq!(parameter_rows(&model, "experts.weight"), experts);
        assert_ne!(model.replicated(), rest);
        Ok(())
    });
}

/// Errors of the ranks, all of which have one.
fn errors(ranks: usize, program: impl Fn(&FsepRuntime) -> Result<(), FsepError> + Sync) -> Vec<String> {
    let config = LaunchConfig::new(ranks).with_timeout(Duration::from_secs(20));
    let results = launch(&config, |comm| program(&FsepRuntimeConfig::new().with_seed(SEED).init(comm)?));
    results.into_iter().map(|result| result.unwrap_err().to_string()).collect()
}

#[test]
fn what_cannot_be_stepped_is_refused_on_all_ranks() {
    let biases = config().with_add_bias_linear(true);
    let by_ids = |model: &SmallMoe| {
        let muon = MuonConfig::new().build();
        ModuleOptimizer::from(adamw().build()).with_group(ParamGroup::ids_from_module(model.clone()), muon, None)
    };
    type OptimizerOf = fn(&SmallMoe) -> ModuleOptimizer;
    let adafactor: OptimizerOf = |_| AdafactorConfig::new().init();
    let refused: [(FSEPMoEConfig, OptimizerOf, &str); 3] = [
        (config(), adafactor, "has the shape [1, 3], and checkpoints, which any number of ranks loads"),
        (biases, |_| muon_for_experts(), "they have biases, which are vectors"),
        (config(), by_ids, "make the group by path"),
    ];
    for (config, optimizer, expected) in refused {
        for ranks in [1, 2] {
            let told = errors(ranks, |runtime| {
                let model = SmallMoe::fsep_of(&config, runtime, &device())?;
                WholeMatrixOptimizer::new(runtime, optimizer(&model), &model).map(drop).inspect_err(|error| {
                    let FsepError::WholeMatrixOptimizer { parameter, .. } = error else { panic!("{error}") };
                    assert_eq!(parameter, "layers.0.Fsep.experts.weight");
                })
            });
            assert!(told.iter().all(|error| error.contains(expected)), "{told:?}");
        }
    }
    // What a rank has of experts is still no matrix, and the error says what to do.
    let told = errors(2, |runtime| trainer(runtime, &config(), |_| Ok(muon_for_experts())).map(drop));
    assert!(told.iter().all(|error| error.contains("`WholeMatrixOptimizer` steps them")), "{told:?}");
}

#[test]
fn its_state_is_of_no_other_optimizer() {
    on_ranks((2, 2), |runtime| {
        let sgd = SgdConfig::new().with_momentum(Some(MomentumConfig::new())).init();
        let model = SmallMoe::fsep_of(&config(), runtime, &device())?;
        let mut optimizer = WholeMatrixOptimizer::new(runtime, sgd, &model)?;
        let loss = model.loss(&batch(&task_items(BATCH, 1), 0, of(runtime)));
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        sync_gradients(runtime, &model, &mut grads)?;
        let model = optimizer.step(LR, model, grads)?;
        // State that may be none of matrices.
        let error = WholeMatrixOptimizer::new(runtime, optimizer.module_optimizer().clone(), &model).err();
        assert!(matches!(error, Some(FsepError::Config(_))), "{error:?}");
        // Its optimizer alone has a state that is of no parameter.
        let folder = tempfile::tempdir().unwrap();
        let (inner, progress) = (optimizer.module_optimizer(), TrainingProgress::new(1));
        let error = checkpoint::save(folder.path(), runtime, &model, inner, &progress).unwrap_err();
        assert!(matches!(error, CheckpointError::Unsupported { .. }), "{error}");
        Ok(())
    });
}

#[test]
fn ranks_that_do_otherwise_are_an_error_on_all_ranks() {
    let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(20));
    let small = || FSEPMoEConfig::new(HIDDEN, FFN, EXPERTS).with_slots_per_rank(Some(4));
    let results = launch(&config, |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        match runtime.rank() {
            0 => trainer(&runtime, &small(), |_| Ok(adamw().init())).map(drop),
            _ => trainer(&runtime, &small(), |model| WholeMatrixOptimizer::new(&runtime, adamw().init(), model))
                .map(drop),
        }
    });
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("whole-matrix optimizer"), "{error}");
    }
    // A rank that steps without gradients.
    let results = launch(&config, |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let model = SmallMoe::fsep_of(&small(), &runtime, &device())?;
        let mut optimizer = WholeMatrixOptimizer::new(&runtime, muon_for_experts(), &model)?;
        let loss = model.loss(&batch(&task_items(BATCH, 1), 0, of(&runtime)));
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        if runtime.rank() == 1 {
            grads = GradientsParams::new();
        }
        optimizer.step(LR, model, grads).map(drop)
    });
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("rank 1 has gradients of the experts of other layers"), "{error}");
    }
    // States of another number of steps, of which the checkpoint would keep one.
    let folder = tempfile::tempdir().unwrap();
    let results = launch(&config, |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let model = SmallMoe::fsep_of(&small(), &runtime, &device())?;
        let mut optimizer = WholeMatrixOptimizer::new(&runtime, adamw().init(), &model)?;
        let loss = model.loss(&batch(&task_items(BATCH, 1), 0, of(&runtime)));
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        sync_gradients(&runtime, &model, &mut grads)?;
        let model = optimizer.step(LR, model, grads)?;
        if runtime.rank() == 1 {
            optimizer = WholeMatrixOptimizer::new(&runtime, adamw().init(), &model)?;
        }
        let error =
            checkpoint::save(folder.path(), &runtime, &model, &optimizer, &TrainingProgress::new(1)).unwrap_err();
        assert!(error.to_string().contains("differ between ranks"), "{error}");
        Ok(())
    });
    results.into_iter().for_each(|result| result.unwrap());
    assert!(list(folder.path()).unwrap().is_empty());
}
