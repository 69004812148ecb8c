//! Checkpoints: what was saved comes back bit for bit, on any number of ranks; what is damaged does not come back at all.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use burn::{
    nn::{Linear, LinearConfig},
    optim::{AdafactorConfig, AdamWConfig, GradientsParams, LambConfig, ModuleOptimizer, SgdConfig},
    tensor::DType,
};
use burn_fsep::{
    ExpertParallelism, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    checkpoint::{
        self, CheckpointConfig, CheckpointError, TrainingProgress, export_unsharded, import_unsharded, list, verify,
    },
    comm::local::LaunchConfig,
    train::FusedAdamWConfig,
};
use burn_fsep_planner::Layout;
use burn_fsep_tests::{SmallMoe, TaskItem, Trainer, device, launch_runtimes, task_items};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A multiple of all numbers of ranks in these tests.
const BATCH: usize = 24;
/// Steps before the checkpoint, and after.
const STEPS: usize = 6;
const NEXT: usize = 20;

fn items() -> Vec<TaskItem> {
    task_items(40 * BATCH, 5)
}

/// An expert of 231 parameters: 2, 4, 5 and 8 ranks have padded shards.
fn config(slots: usize) -> FSEPMoEConfig {
    FSEPMoEConfig::new(7, 11, 8).with_slots_per_rank(Some(slots))
}

fn static_config() -> FSEPMoEConfig {
    FSEPMoEConfig::new(7, 11, 8).with_expert_parallelism(ExpertParallelism::Static)
}

fn fewest_slots(ranks: usize) -> usize {
    8usize.div_ceil(ranks)
}

/// What every rank of a group makes of its runtime.
fn on_ranks<T: Send>(ranks: usize, program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync) -> Vec<T> {
    on_ranks_with(FsepRuntimeConfig::new, ranks, program)
}

fn on_ranks_with<T: Send>(
    config: impl Fn() -> FsepRuntimeConfig,
    ranks: usize,
    program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync,
) -> Vec<T> {
    let launched = LaunchConfig::new(ranks).with_timeout(Duration::from_secs(20));
    launch_runtimes(&launched, &config().with_seed(3), program)
}

/// Trains, saves a checkpoint, and trains on: the losses after the checkpoint, and what rank 0 had when it saved.
fn train_and_save(config: &FSEPMoEConfig, ranks: usize, folder: &Path) -> (PathBuf, Vec<f32>) {
    let mut results = on_ranks(ranks, |runtime| {
        let mut trainer = Trainer::new(config, runtime)?;
        trainer.train(&items(), BATCH, STEPS)?;
        let progress = TrainingProgress::new(STEPS as u64).with_metadata("note", "ä").with_record("mine", vec![0, 255]);
        let path = checkpoint::save(folder, runtime, &trainer.model, &trainer.optimizer, &progress)?;
        Ok((path, trainer.train(&items(), BATCH, NEXT)?))
    });
    results.swap_remove(0)
}

/// Loads a checkpoint into a new model and trains on.
fn load_and_train(config: &FSEPMoEConfig, ranks: usize, path: &Path) -> Vec<f32> {
    let mut losses = on_ranks(ranks, |runtime| {
        let mut trainer = load(config, runtime, path)?;
        trainer.train(&items(), BATCH, NEXT)
    });
    losses.swap_remove(0)
}

fn load(config: &FSEPMoEConfig, runtime: &FsepRuntime, path: &Path) -> Result<Trainer, FsepError> {
    let mut trainer = Trainer::new(config, runtime)?;
    let loaded = checkpoint::load(path, runtime, &trainer.model, &trainer.optimizer)?;
    assert_eq!(loaded.progress.metadata["note"], "ä");
    assert_eq!(loaded.progress.records["mine"], [0, 255]);
    trainer.step = loaded.progress.step as usize;
    (trainer.model, trainer.optimizer) = (loaded.model, loaded.optimizer);
    Ok(trainer)
}

#[test]
fn the_same_ranks_go_on_bit_for_bit() {
    for (ranks, config) in
        [(1, config(8)), (2, config(5)), (3, config(3)), (4, config(3)), (4, static_config()), (8, config(1))]
    {
        let folder = tempfile::tempdir().unwrap();
        let saved = on_ranks(ranks, |runtime| {
            let mut trainer = Trainer::new(&config, runtime)?;
            trainer.train(&items(), BATCH, STEPS)?;
            let progress =
                TrainingProgress::new(STEPS as u64).with_metadata("note", "ä").with_record("mine", vec![0, 255]);
            checkpoint::save(folder.path(), runtime, &trainer.model, &trainer.optimizer, &progress)?;
            let (bits, layouts) = (trainer.bits(), [runtime.layout(0), runtime.layout(1)]);
            Ok((bits, layouts, trainer.train(&items(), BATCH, NEXT)?, trainer.bits()))
        });
        let path = list(folder.path()).unwrap().pop().unwrap();
        let resumed = on_ranks(ranks, |runtime| {
            let mut trainer = load(&config, runtime, &path)?;
            let (bits, layouts) = (trainer.bits(), [runtime.layout(0), runtime.layout(1)]);
            Ok((bits, layouts, trainer.train(&items(), BATCH, NEXT)?, trainer.bits()))
        });
        for (saved, resumed) in saved.iter().zip(&resumed) {
            assert!(saved.0.len() > 5 * 3, "parameters, moments and times are compared");
            assert_eq!(saved.0, resumed.0, "{ranks} ranks: parameters or optimizer state");
            assert_eq!(saved.1, resumed.1, "{ranks} ranks: layouts");
            assert_eq!(saved.2, resumed.2, "{ranks} ranks: losses");
            assert_eq!(saved.3, resumed.3, "{ranks} ranks: parameters or optimizer state at the end");
        }
        assert_ne!(saved[0].0, saved[0].3, "training changes what is compared");
    }
}

#[test]
fn the_layouts_of_a_checkpoint_count_as_no_move() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = train_and_save(&config(3), 3, folder.path());
    // A repair moves a slot wherever the router's choice makes it worth it.
    let without_repair = || FsepRuntimeConfig::new().with_repair(None);
    let moved = on_ranks_with(without_repair, 3, |runtime| {
        let mut trainer = load(&config(3), runtime, &path)?;
        assert_ne!(*runtime.layout(0), Layout::static_ep(3, 3, 8)?, "that of a new layer");
        let steps = [(); 2].map(|()| trainer.train(&items(), BATCH, 1).map(|_| runtime.stats().moved_slots()));
        let [first, second] = steps;
        Ok((first?, second?))
    });
    assert!(moved.iter().all(|(first, second)| *first == 0 && *second > 0), "{moved:?}");
}

#[test]
fn any_number_of_ranks_goes_on_from_any_other() {
    let fewest = |ranks| (ranks, config(fewest_slots(ranks)));
    let more = |ranks| (ranks, config((fewest_slots(ranks) + 2).min(8)));
    let to: Vec<_> =
        [1, 2, 3, 4, 8].map(more).into_iter().chain([(2, static_config()), (8, static_config())]).collect();
    for (saving, config) in [1, 2, 3, 4, 8].map(fewest).into_iter().chain([(4, static_config())]) {
        let folder = tempfile::tempdir().unwrap();
        let (path, undisturbed) = train_and_save(&config, saving, folder.path());
        for (loading, config) in &to {
            let losses = load_and_train(config, *loading, &path);
            for (step, (ours, expected)) in losses.iter().zip(&undisturbed).enumerate() {
                let error = (ours - expected).abs() / expected;
                assert!(error <= 1e-5, "{saving} to {loading} ranks, step {step}: {ours} instead of {expected}");
            }
        }
    }
}

#[test]
fn without_the_optimizer_state_losses_differ() {
    let folder = tempfile::tempdir().unwrap();
    let (path, undisturbed) = train_and_save(&config(5), 2, folder.path());
    let losses = on_ranks(4, |runtime| {
        let mut trainer = load(&config(3), runtime, &path)?;
        trainer.optimizer = AdamWConfig::new().with_epsilon(1e-6).with_weight_decay(0.01).init();
        trainer.train(&items(), BATCH, NEXT)
    });
    let largest = losses[0].iter().zip(&undisturbed).map(|(a, b)| (a - b).abs() / b).fold(0.0, f32::max);
    assert!(largest > 1e-3, "the comparison sees nothing: {largest}");
}

/// The error of each rank when it loads into a new model, after checking that nothing was changed.
fn load_errors(ranks: usize, path: &Path) -> Vec<CheckpointError> {
    on_ranks(ranks, |runtime| {
        let trainer = Trainer::new(&config(5), runtime)?;
        let (bits, layouts) = (trainer.bits(), [runtime.layout(0), runtime.layout(1)]);
        let error = match checkpoint::load(path, runtime, &trainer.model, &trainer.optimizer) {
            Ok(_) => panic!("a damaged checkpoint was loaded"),
            Err(error) => error,
        };
        assert_eq!(trainer.bits(), bits);
        assert_eq!([runtime.layout(0), runtime.layout(1)], layouts);
        Ok(error)
    })
}

/// Checks that loading `path` fails on all ranks with a damage of the file.
fn assert_damaged(path: &Path, file: &str, what: &str) {
    for error in load_errors(2, path) {
        assert!(error.is_damage() && error.to_string().contains(file), "{what}: {error}");
    }
    let error = verify(path).unwrap_err();
    assert!(error.is_damage() && error.to_string().contains(file), "{what}: {error}");
}

fn file_names(checkpoint: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(checkpoint).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The name that an error has to have: a wrong checksum of the manifest is told as the manifest's.
fn blamed(file: &str) -> &str {
    if file == "manifest.sha256" { "manifest" } else { file }
}

#[test]
fn whatever_bit_is_flipped_nothing_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = train_and_save(&config(5), 2, folder.path());
    let names = file_names(&path);
    let expected = [
        "experts-00000-of-00002.safetensors",
        "experts-00001-of-00002.safetensors",
        "manifest.json",
        "manifest.sha256",
        "replicated.safetensors",
    ];
    assert_eq!(names, expected);
    let mut random = StdRng::seed_from_u64(1);
    for name in &names {
        let file = path.join(name);
        let whole = fs::read(&file).unwrap();
        for flip in 0..40 {
            // Headers are short: a part of the flips goes there.
            let end = if flip < 10 { 64 } else { whole.len() };
            let (place, bit) = (random.random_range(0..end), random.random_range(0..8));
            let mut bytes = whole.clone();
            bytes[place] ^= 1 << bit;
            fs::write(&file, bytes).unwrap();
            assert_damaged(&path, blamed(name), &format!("bit {bit} of byte {place} of {name}"));
        }
        fs::write(&file, whole).unwrap();
    }
    assert_eq!(verify(&path).unwrap().world_size, 2);
    load_and_train(&config(5), 2, &path);
}

#[test]
fn files_that_are_cut_off_missing_or_swapped_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = train_and_save(&config(5), 2, folder.path());
    let (other, _) = {
        // Of another training: the same names and sizes, other content.
        let mut results = on_ranks(2, |runtime| {
            let mut trainer = Trainer::new(&config(5), runtime)?;
            trainer.train(&items(), BATCH, STEPS + 1)?;
            let progress = TrainingProgress::new(STEPS as u64);
            Ok((checkpoint::save(folder.path(), runtime, &trainer.model, &trainer.optimizer, &progress)?, ()))
        });
        results.swap_remove(0)
    };
    for name in file_names(&path) {
        let file = path.join(&name);
        let whole = fs::read(&file).unwrap();
        for len in [0, 5, whole.len() / 2, whole.len() - 1] {
            fs::write(&file, &whole[..len]).unwrap();
            assert_damaged(&path, blamed(&name), &format!("{name} cut off after {len} bytes"));
        }
        fs::write(&file, [&whole[..], b"\n"].concat()).unwrap();
        assert_damaged(&path, blamed(&name), &format!("{name} with a byte more"));
        fs::write(&file, b"{\"format\": \"another program's\"}").unwrap();
        assert_damaged(&path, blamed(&name), &format!("a foreign {name}"));
        fs::remove_file(&file).unwrap();
        assert_damaged(&path, &name, &format!("a missing {name}"));
        fs::copy(other.join(&name), &file).unwrap();
        assert_damaged(&path, blamed(&name), &format!("{name} of another checkpoint"));
        fs::write(&file, whole).unwrap();
    }
    // Both manifest files of the other one: now all others are foreign.
    let whole = ["manifest.json", "manifest.sha256"].map(|name| fs::read(path.join(name)).unwrap());
    for name in ["manifest.json", "manifest.sha256"] {
        fs::copy(other.join(name), path.join(name)).unwrap();
    }
    assert_damaged(&path, "safetensors", "the manifest of another checkpoint");
    for (name, whole) in ["manifest.json", "manifest.sha256"].into_iter().zip(whole) {
        fs::write(path.join(name), whole).unwrap();
    }
    // Two ranks' files swapped.
    let [first, second] = [0, 1].map(|rank| path.join(format!("experts-0000{rank}-of-00002.safetensors")));
    let spare = path.join("spare");
    fs::rename(&first, &spare).unwrap();
    fs::rename(&second, &first).unwrap();
    fs::rename(&spare, &second).unwrap();
    assert_damaged(&path, "experts-0000", "swapped files");
    assert_damaged(&folder.path().join("nothing"), "manifest.json", "no checkpoint");
}

#[test]
fn another_model_or_optimizer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, _) = train_and_save(&config(5), 2, folder.path());
    let refusal = |config: FSEPMoEConfig| {
        let errors = on_ranks(2, |runtime| {
            let trainer = Trainer::new(&config, runtime)?;
            Ok(checkpoint::load(&path, runtime, &trainer.model, &trainer.optimizer).map(drop).unwrap_err())
        });
        assert!(errors.iter().all(|error| matches!(error, CheckpointError::Model { .. })), "{errors:?}");
        errors[0].to_string()
    };
    let base = |hidden, ffn, experts| FSEPMoEConfig::new(hidden, ffn, experts).with_slots_per_rank(Some(5));
    assert!(refusal(base(7, 11, 10)).contains("`layers.0.Fsep.router.weight` is [7, 8] in the checkpoint"));
    assert!(refusal(base(7, 10, 8)).contains("has E = 8, D = 7, F = 11 in the checkpoint, E = 8, D = 7, F = 10"));
    assert!(refusal(base(6, 11, 8)).contains("`input.weight` is [6, 7] in the checkpoint, [6, 6] in the model"));

    let error = |load: &(dyn Fn(&FsepRuntime) -> CheckpointError + Sync)| {
        on_ranks(2, |runtime| Ok(load(runtime))).swap_remove(0).to_string()
    };
    let dense = error(&|runtime| {
        let model = SmallMoe::dense_of(&config(5), 3, &device()).unwrap();
        checkpoint::load(&path, runtime, &model, &AdamWConfig::new().init()).map(drop).unwrap_err()
    });
    assert!(dense.contains("`layers.0.Dense.router.weight` is not in the checkpoint"), "{dense}");
    for other in [SgdConfig::new().init(), LambConfig::new().init(), AdafactorConfig::new().init()] {
        let message = error(&|runtime| {
            let trainer = Trainer::new(&config(5), runtime).unwrap();
            checkpoint::load(&path, runtime, &trainer.model, &other).map(drop).unwrap_err()
        });
        assert!(message.contains("does not fit the optimizer: its state of `input.weight`"), "{message}");
    }
}

/// The error of each rank when it saves after a step with this optimizer.
fn save_errors(
    folder: &Path,
    optimizer: &ModuleOptimizer,
    change: impl Fn(&FsepRuntime, &mut Trainer, &mut TrainingProgress) + Sync,
) -> Vec<CheckpointError> {
    on_ranks(2, |runtime| {
        let mut trainer = Trainer::new(&config(5), runtime)?;
        trainer.optimizer = optimizer.clone();
        trainer.train(&items(), BATCH, 1)?;
        let mut progress = TrainingProgress::new(1);
        change(runtime, &mut trainer, &mut progress);
        let error = checkpoint::save(folder, runtime, &trainer.model, &trainer.optimizer, &progress).unwrap_err();
        assert!(runtime.comm().failure().is_none(), "training can go on");
        Ok(error)
    })
}

#[test]
fn ranks_that_differ_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let adam = AdamWConfig::new().init();
    let differing = |change: &(dyn Fn(&FsepRuntime, &mut Trainer, &mut TrainingProgress) + Sync), what: &str| {
        for error in save_errors(folder.path(), &adam, change) {
            assert!(matches!(&error, CheckpointError::Divergence { rank: 1, .. }), "{error}");
            assert!(error.to_string().contains(what), "{error}");
        }
        assert!(list(folder.path()).unwrap().is_empty());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
    };
    differing(
        &|runtime, trainer, _| {
            let scale = 1.0 + runtime.rank() as f64;
            trainer.model.scale_input(scale);
        },
        "model/input.weight",
    );
    differing(&|runtime, _, progress| progress.step += runtime.rank() as u64, "the step");
    differing(
        &|runtime, trainer, _| {
            if runtime.rank() == 1 {
                trainer.optimizer = AdamWConfig::new().init();
            }
        },
        "optimizer state",
    );
}

#[test]
fn optimizers_that_see_whole_matrices_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for error in save_errors(folder.path(), &AdafactorConfig::new().init(), |_, _, _| {}) {
        assert!(error.to_string().contains("element by element"), "{error}");
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_on_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "no folder").unwrap();
    let errors = save_errors(&file.join("checkpoints"), &AdamWConfig::new().init(), |_, _, _| {});
    assert!(matches!(&errors[0], CheckpointError::Io { action: "create", .. }), "{}", errors[0]);
    assert!(matches!(&errors[1], CheckpointError::Peer { rank: 0, damaged: false, .. }), "{}", errors[1]);
    assert!(errors.iter().all(|error| error.to_string().contains("cannot create")), "{errors:?}");
}

#[test]
fn the_last_checkpoints_are_kept_and_the_newest_whole_one_is_found() {
    for background in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        // What a job left that was killed.
        let dead = folder.path().join(".partial-000001-step-00000009");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("replicated.safetensors"), "half").unwrap();
        let steps = on_ranks(2, |runtime| {
            let settings = CheckpointConfig::new(folder.path()).with_keep(3).with_background(background);
            let mut checkpoints = settings.init(runtime)?;
            let mut trainer = Trainer::new(&config(5), runtime)?;
            assert!(checkpoints.load_newest(&trainer.model, &trainer.optimizer)?.is_none());
            assert!(checkpoints.load_newest_whole(&trainer.model, &trainer.optimizer)?.is_none());
            let mut saved = Vec::new();
            for _ in 0..5 {
                trainer.train(&items(), BATCH, 2)?;
                saved.push(trainer.bits());
                checkpoints.save(&trainer.model, &trainer.optimizer, &TrainingProgress::new(trainer.step as u64))?;
                checkpoints.poll()?;
            }
            checkpoints.finish()?;
            runtime.comm().barrier(burn_fsep::comm::Operation::new("all are saved"))?;

            let loaded = checkpoints.load_newest(&trainer.model, &trainer.optimizer)?.expect("there are some");
            assert_eq!((loaded.progress.step, loaded.skipped.len()), (10, 0));
            let kept = list(folder.path())?;
            if runtime.rank() == 0 {
                // The newest is damaged, then the one before, too; then all.
                damage(&kept[2]);
            }
            runtime.comm().barrier(burn_fsep::comm::Operation::new("one is damaged"))?;
            assert!(checkpoints.load_newest(&trainer.model, &trainer.optimizer).unwrap_err().is_damage());
            let mut loaded = checkpoints.load_newest_whole(&trainer.model, &trainer.optimizer)?.expect("two are whole");
            assert_eq!((loaded.progress.step, loaded.skipped.len()), (8, 1));
            assert!(loaded.skipped[0].to_string().contains("step-00000010"), "{}", loaded.skipped[0]);
            std::mem::swap(&mut trainer.model, &mut loaded.model);
            std::mem::swap(&mut trainer.optimizer, &mut loaded.optimizer);
            assert_eq!(trainer.bits(), saved[3]);

            runtime.comm().barrier(burn_fsep::comm::Operation::new("all have loaded"))?;
            if runtime.rank() == 0 {
                kept[..2].iter().for_each(|path| damage(path));
            }
            runtime.comm().barrier(burn_fsep::comm::Operation::new("all are damaged"))?;
            let error = checkpoints.load_newest_whole(&trainer.model, &trainer.optimizer).unwrap_err();
            assert!(matches!(error, CheckpointError::NoneWhole { count: 3, .. }), "{error}");
            Ok(kept.len())
        });
        assert_eq!(steps, [3, 3]);
        let mut names = file_names(folder.path());
        names.retain(|name| name.starts_with('.'));
        assert!(names.is_empty(), "left: {names:?}");
    }
}

fn damage(checkpoint: &Path) {
    let file = checkpoint.join("experts-00001-of-00002.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn the_dense_model_and_the_sharded_one_exchange_their_experts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let items = items();
    for (saving, config) in [(3, config(3)), (4, static_config())] {
        let saved = on_ranks(saving, |runtime| {
            let mut trainer = Trainer::new(&config, runtime)?;
            trainer.train(&items, BATCH, STEPS)?;
            let progress = TrainingProgress::new(STEPS as u64);
            let path = checkpoint::save(folder.path(), runtime, &trainer.model, &trainer.optimizer, &progress)?;
            Ok((path, trainer.model.loss_of(&items[..BATCH])))
        });
        export_unsharded(&saved[0].0, &file).unwrap();
        assert_eq!(file_names(folder.path()).iter().filter(|name| name.contains("partial")).count(), 0);
        let expected = saved[0].1;

        let dense = SmallMoe::dense_of(&config, 99, &device()).unwrap();
        let imported = import_unsharded(&file, &FsepRuntime::single(), &dense).unwrap();
        let ours = imported.loss_of(&items[..BATCH]);
        assert!((ours - expected).abs() <= 1e-6 * expected, "dense: {ours} instead of {expected}");
        assert_ne!(dense.loss_of(&items[..BATCH]), ours, "the model was another one before");
        for ranks in [1, 2, 8] {
            let losses = on_ranks(ranks, |runtime| {
                let mut trainer = Trainer::new(&self::config(fewest_slots(ranks)), runtime)?;
                trainer.model = import_unsharded(&file, runtime, &trainer.model)?;
                Ok(trainer.model.loss_of(&items[..BATCH]))
            });
            assert!(losses.iter().all(|ours| (ours - expected).abs() <= 1e-6 * expected), "{ranks} ranks: {losses:?}");
        }
    }

    // Names and shapes are those of the documentation.
    let small = SmallMoe::dense_of(&FSEPMoEConfig::new(7, 11, 4), 1, &device()).unwrap();
    let error = import_unsharded(&file, &FsepRuntime::single(), &small).unwrap_err();
    assert!(error.to_string().contains("`layers.0.router.weight` is F32 [7, 8] in the file"), "{error}");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let errors = on_ranks(2, |runtime| {
        let trainer = Trainer::new(&config(5), runtime)?;
        Ok(import_unsharded(&file, runtime, &trainer.model).map(drop).unwrap_err())
    });
    assert!(errors.iter().all(CheckpointError::is_damage), "{errors:?}");
}

#[test]
fn half_precision_comes_back_with_its_type_or_not_at_all() {
    let (folder, runtime, device) = (tempfile::tempdir().unwrap(), FsepRuntime::single(), device());
    let mut model = LinearConfig::new(3, 4).with_bias(false).init(&device);
    model.weight = model.weight.map(|weight| weight.cast(DType::BF16).detach().require_grad());
    let train = |model: &Linear, optimizer: &mut ModuleOptimizer| {
        let loss = (model.weight.val() * 3.0).square().sum();
        optimizer.step(1e-2, model.clone(), GradientsParams::from_grads(loss.backward(), model))
    };
    let bytes = |optimizer: &ModuleOptimizer| optimizer.into_bytes().unwrap().to_vec();
    for single in [false, true] {
        let new = || FusedAdamWConfig::new().with_single_precision_moments(single).init();
        let mut optimizer = new();
        let model = train(&model, &mut optimizer);
        let path = checkpoint::save(folder.path(), &runtime, &model, &optimizer, &TrainingProgress::new(1)).unwrap();
        let loaded = checkpoint::load(path, &runtime, &model, &new()).unwrap();
        assert_eq!(loaded.model.weight.val().into_data(), model.weight.val().into_data());
        assert_eq!(bytes(&loaded.optimizer), bytes(&optimizer), "types and bits of moments, single: {single}");
    }
    // Burn's own optimizer would get moments of the default device's type.
    let mut optimizer = AdamWConfig::new().init();
    let model = train(&model, &mut optimizer);
    let path = checkpoint::save(folder.path(), &runtime, &model, &optimizer, &TrainingProgress::new(1)).unwrap();
    let error = checkpoint::load(path, &runtime, &model, &AdamWConfig::new().init()).unwrap_err();
    assert!(error.to_string().contains("is of type BF16, but Burn loads it in the default type"), "{error}");
}
