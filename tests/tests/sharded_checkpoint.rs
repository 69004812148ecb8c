//! Checkpoints of optimizer state that is cut over ranks: the files of whole state, for any number of ranks, cut or not.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use burn::optim::AdamConfig;
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    checkpoint::{self, CheckpointError, CheckpointedOptimizer, TrainingProgress, list, verify},
    comm::local::LaunchConfig,
    train::{ShardedOptimizer, TrainOptimizer},
};
use burn_fsep_tests::{TaskItem, Trainer, launch_runtimes, task_items};

const BATCH: usize = 24;
const STEPS: usize = 6;
const NEXT: usize = 20;

fn items() -> Vec<TaskItem> {
    task_items(40 * BATCH, 5)
}

/// Sizes that most numbers of ranks do not divide.
fn config(ranks: usize) -> FSEPMoEConfig {
    FSEPMoEConfig::new(7, 11, 8).with_slots_per_rank(Some((8usize.div_ceil(ranks) + 1).min(8)))
}

fn on_ranks<T: Send>(ranks: usize, program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync) -> Vec<T> {
    let launched = LaunchConfig::new(ranks).with_timeout(Duration::from_secs(20));
    launch_runtimes(&launched, &FsepRuntimeConfig::new().with_seed(3), program)
}

/// Trains, saves, and trains on: the bits when it saved and in the end, and the losses after the checkpoint.
fn save_and_go_on<O: TrainOptimizer>(
    mut trainer: Trainer<O>,
    runtime: &FsepRuntime,
    folder: &Path,
) -> Result<Resumed, FsepError> {
    trainer.train(&items(), BATCH, STEPS)?;
    let progress = TrainingProgress::new(STEPS as u64);
    checkpoint::save(folder, runtime, &trainer.model, &trainer.optimizer, &progress)?;
    go_on(trainer)
}

fn load_and_go_on<O: TrainOptimizer>(
    mut trainer: Trainer<O>,
    runtime: &FsepRuntime,
    path: &Path,
) -> Result<Resumed, FsepError> {
    let loaded = checkpoint::load(path, runtime, &trainer.model, &trainer.optimizer)?;
    trainer.step = loaded.progress.step as usize;
    (trainer.model, trainer.optimizer) = (loaded.model, loaded.optimizer);
    go_on(trainer)
}

type Bits = Vec<(String, Vec<u8>)>;
type Resumed = (Bits, Vec<f32>, Bits);

fn go_on<O: TrainOptimizer>(mut trainer: Trainer<O>) -> Result<Resumed, FsepError> {
    Ok((trainer.bits(), trainer.train(&items(), BATCH, NEXT)?, trainer.bits()))
}

fn save(ranks: usize, is_cut: bool, folder: &Path) -> (PathBuf, Vec<Resumed>) {
    let config = config(ranks);
    let saved = on_ranks(ranks, |runtime| match is_cut {
        true => save_and_go_on(Trainer::sharded(&config, runtime)?, runtime, folder),
        false => save_and_go_on(Trainer::new(&config, runtime)?, runtime, folder),
    });
    (list(folder).unwrap().pop().unwrap(), saved)
}

fn load(ranks: usize, is_cut: bool, path: &Path) -> Vec<Resumed> {
    let config = config(ranks);
    on_ranks(ranks, |runtime| match is_cut {
        true => load_and_go_on(Trainer::sharded(&config, runtime)?, runtime, path),
        false => load_and_go_on(Trainer::new(&config, runtime)?, runtime, path),
    })
}

#[test]
fn the_same_ranks_go_on_bit_for_bit_and_the_files_are_those_of_whole_state() {
    for ranks in [1, 2, 3, 4, 8] {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let (whole_path, whole) = save(ranks, false, folders[0].path());
        let (path, saved) = save(ranks, true, folders[1].path());
        assert_eq!(load(ranks, true, &path), saved, "{ranks} ranks");
        for file in fs::read_dir(&whole_path).unwrap() {
            let name = file.unwrap().file_name();
            let [whole, cut] = [&whole_path, &path].map(|path| fs::read(path.join(&name)).unwrap());
            assert!(whole == cut, "{ranks} ranks: {name:?} is another file");
        }
        for (whole, cut) in whole.iter().zip(&saved) {
            assert_eq!(whole.1, cut.1, "{ranks} ranks: losses");
        }
        verify(&path).unwrap();
    }
}

#[test]
fn any_number_of_ranks_goes_on_from_any_other_cut_or_not() {
    let all: Vec<_> = [1, 2, 4, 8].into_iter().flat_map(|ranks| [(ranks, false), (ranks, true)]).collect();
    for &(saving, was_cut) in &all {
        let folder = tempfile::tempdir().unwrap();
        let (path, undisturbed) = save(saving, was_cut, folder.path());
        for &(loading, is_cut) in &all {
            let resumed = load(loading, is_cut, &path);
            for (step, (ours, expected)) in resumed[0].1.iter().zip(&undisturbed[0].1).enumerate() {
                let error = (ours - expected).abs() / expected;
                assert!(
                    error <= 1e-5,
                    "{saving} ranks, cut: {was_cut}, to {loading}, cut: {is_cut}, step {step}: {ours} instead of {expected}"
                );
            }
            if loading == saving {
                assert_eq!(resumed[0].1, undisturbed[0].1, "{saving} ranks, cut: {was_cut}, to cut: {is_cut}");
            }
        }
    }
}

#[test]
fn a_part_is_never_saved_for_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    on_ranks(4, |runtime| {
        let mut trainer = Trainer::sharded(&config(4), runtime)?;
        trainer.train(&items(), BATCH, 1)?;
        let (optimizer, progress) = (trainer.optimizer.module_optimizer().clone(), TrainingProgress::new(1));
        let error = checkpoint::save(folder.path(), runtime, &trainer.model, &optimizer, &progress).unwrap_err();
        let CheckpointError::Unsupported { reason, .. } = &error else { panic!("{error}") };
        assert!(reason.contains("save the `ShardedOptimizer`"), "{error}");
        Ok(())
    });
    assert!(list(folder.path()).unwrap().is_empty());
}

#[test]
fn ranks_that_cut_and_ranks_that_do_not_save_nothing() {
    let folder = tempfile::tempdir().unwrap();
    on_ranks(2, |runtime| {
        let trainer = Trainer::new(&config(2), runtime)?;
        let progress = TrainingProgress::new(1);
        let error = if runtime.rank() == 0 {
            checkpoint::save(folder.path(), runtime, &trainer.model, &trainer.optimizer, &progress).unwrap_err()
        } else {
            let optimizer = ShardedOptimizer::new(runtime, AdamConfig::new().init(), &trainer.model)?;
            checkpoint::save(folder.path(), runtime, &trainer.model, &optimizer, &progress).unwrap_err()
        };
        assert!(matches!(error, CheckpointError::Divergence { .. }), "{error}");
        Ok(())
    });
    assert!(list(folder.path()).unwrap().is_empty());
}
