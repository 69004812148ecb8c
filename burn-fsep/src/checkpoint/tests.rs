//! Disks that fail, and files that lie with valid checksums.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use burn::{
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
    tensor::{Device, Tensor},
};
use sha2::{Digest, Sha256};

use super::{
    CheckpointConfig, CheckpointError, TrainingProgress, list, load,
    manifest::{MANIFEST, MANIFEST_SUM, REPLICATED, experts_file},
    output::{CreateFile, Disk, OutputFile},
    save,
    tensors::hex,
    verify,
};
use crate::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    comm::local::{LaunchConfig, launch},
    train::sync_gradients,
};

fn on_ranks<T: Send>(program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync) -> Vec<T> {
    let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(20));
    let results = launch(&config, |comm| program(&FsepRuntime::new(comm)?));
    results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// A layer after a step.
fn trained(runtime: &FsepRuntime) -> Result<(FSEPMoE, ModuleOptimizer), FsepError> {
    let device = Device::flex().autodiff();
    let layer = FSEPMoEConfig::new(4, 5, 4).init(runtime, &device);
    let mut optimizer = AdamWConfig::new().init();
    let mut grads = runtime.run(|| {
        let output = layer.forward(Tensor::<2>::ones([3, 4], &device));
        GradientsParams::from_grads(output.square().mean().backward(), &layer)
    })?;
    sync_gradients(runtime, &layer, &mut grads)?;
    let layer = optimizer.step(1e-2, layer, grads);
    Ok((layer, optimizer))
}

/// A disk that is full after so many bytes.
#[derive(Debug)]
struct SmallDisk(Arc<AtomicU64>);

struct SmallFile(Box<dyn OutputFile>, Arc<AtomicU64>);

impl CreateFile for SmallDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn OutputFile>> {
        Ok(Box::new(SmallFile(Disk.create(path)?, self.0.clone())))
    }
}

impl Write for SmallFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let left = self.1.load(Ordering::Relaxed).min(data.len() as u64);
        if left == 0 && !data.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.1.fetch_sub(left, Ordering::Relaxed);
        self.0.write(&data[..left as usize])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl OutputFile for SmallFile {
    fn sync(&mut self) -> io::Result<()> {
        self.0.sync()
    }
}

/// Saves a first checkpoint, then another one to a disk on which only so many bytes of one rank fit; the second's errors.
fn save_to_small_disk(full: usize, bytes: u64, background: bool) -> Vec<Option<CheckpointError>> {
    let folder = tempfile::tempdir().unwrap();
    let errors = on_ranks(|runtime| {
        let (model, optimizer) = trained(runtime)?;
        let first = save(folder.path(), runtime, &model, &optimizer, &TrainingProgress::new(1))?;
        let disk = Arc::new(AtomicU64::new(if runtime.rank() == full { bytes } else { u64::MAX }));
        let config = CheckpointConfig::new(folder.path()).with_background(background);
        let mut checkpoints = config.init(runtime)?.with_files(Arc::new(SmallDisk(disk)));
        let result = checkpoints.save(&model, &optimizer, &TrainingProgress::new(2));
        let result = result.and_then(|()| checkpoints.finish().map(drop));
        // The ranks live on, and so does the first checkpoint.
        assert_eq!(load(&first, runtime, &model, &optimizer)?.progress.step, 1);
        Ok(result.err())
    });
    let whole = if errors[0].is_some() { 1 } else { 2 };
    assert_eq!(list(folder.path()).unwrap().len(), whole);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), whole, "nothing else is left");
    errors
}

#[test]
fn a_full_disk_of_one_rank_is_an_error_on_all_and_leaves_the_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = checkpoint_in(folder.path());
    let len = |name: &str| fs::metadata(path.join(name)).unwrap().len();
    let second = len(&experts_file(1, 2));
    let (tensors, manifest) = (len(REPLICATED) + len(&experts_file(0, 2)), len(MANIFEST));
    let all = tensors + manifest + len(MANIFEST_SUM);
    for background in [false, true] {
        for (full, bytes) in [
            (0, 0),
            (0, len(REPLICATED) / 2),
            (0, tensors - 1),
            (0, tensors + manifest / 2),
            (0, all - 1),
            (1, 0),
            (1, second - 1),
        ] {
            let errors = save_to_small_disk(full, bytes, background);
            let [own, peers] = [full, 1 - full].map(|rank| errors[rank].as_ref().unwrap());
            assert!(matches!(own, CheckpointError::Io { action: "write", .. }), "{own}");
            assert!(matches!(peers, CheckpointError::Peer { rank, .. } if *rank == full), "{peers}");
            assert!(peers.to_string().contains("no storage space"), "{peers}");
        }
        for (full, bytes) in [(0, all), (1, second)] {
            assert_eq!(save_to_small_disk(full, bytes, background), [None, None], "everything fits");
        }
    }
}

/// A checkpoint of two ranks.
fn checkpoint_in(folder: &Path) -> PathBuf {
    let mut paths = on_ranks(|runtime| {
        let (model, optimizer) = trained(runtime)?;
        Ok(save(folder, runtime, &model, &optimizer, &TrainingProgress::new(1))?)
    });
    paths.swap_remove(0)
}

fn load_errors(path: &Path) -> Vec<CheckpointError> {
    on_ranks(|runtime| {
        let (model, optimizer) = trained(runtime)?;
        Ok(load(path, runtime, &model, &optimizer).map(drop).unwrap_err())
    })
}

/// Puts another manifest in the place of a checkpoint's, with a valid checksum.
fn forge_manifest(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut manifest = serde_json::from_slice(&fs::read(path.join(MANIFEST)).unwrap()).unwrap();
    change(&mut manifest);
    let bytes = serde_json::to_vec(&manifest).unwrap();
    fs::write(path.join(MANIFEST_SUM), format!("{}  {MANIFEST}\n", hex(&Sha256::digest(&bytes)))).unwrap();
    fs::write(path.join(MANIFEST), bytes).unwrap();
}

/// Puts another file in the place of a checkpoint's, with valid checksums.
fn forge_file(path: &Path, name: &str, bytes: &[u8]) {
    fs::write(path.join(name), bytes).unwrap();
    forge_manifest(path, |manifest| {
        let files = manifest["files"].as_array_mut().unwrap();
        let entry = files.iter_mut().find(|file| file["name"] == name).unwrap();
        entry["bytes"] = bytes.len().into();
        entry["sha256"] = hex(&Sha256::digest(bytes)).into();
    });
}

#[test]
fn hostile_tensor_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = checkpoint_in(folder.path());
    for name in [REPLICATED.to_string(), experts_file(0, 2), experts_file(1, 2)] {
        let whole = fs::read(path.join(&name)).unwrap();
        let split = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let (header, data) = (String::from_utf8(whole[8..split].to_vec()).unwrap(), &whole[split..]);
        let with_header = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
        let with_len = |len: u64| [&len.to_le_bytes()[..], &whole[8..]].concat();
        let first: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&header).unwrap();
        let tensor = first.keys().next().unwrap();
        let shape = |shape: &str| {
            let mut table = first.clone();
            table[tensor]["shape"] = serde_json::from_str(shape).unwrap();
            serde_json::to_string(&table).unwrap()
        };
        let mut without = first.clone();
        without.remove(tensor);
        for (what, bytes) in [
            ("a header longer than the file", with_len(whole.len() as u64)),
            ("a header of all memory", with_len(u64::MAX)),
            ("a header of a petabyte", with_len(1 << 50)),
            ("no header", with_len(0)),
            ("no file", Vec::new()),
            ("a header that is no JSON", with_header("{]")),
            ("a header of nothing but depth", with_header(&"[".repeat(100_000))),
            ("a table with a gap", with_header(&serde_json::to_string(&without).unwrap())),
            ("an endless tensor", with_header(&shape("[18446744073709551615, 18446744073709551615]"))),
            ("a tensor without elements", with_header(&shape("[0]"))),
            ("another name", with_header(&header.replacen("model/", "model\\u0000", 1))),
            ("another type", with_header(&header.replacen("F32", "I32", 1))),
            ("more data", [&whole[..], &[0; 8]].concat()),
        ] {
            forge_file(&path, &name, &bytes);
            for error in load_errors(&path) {
                assert!(error.is_damage() && error.to_string().contains(&name), "{what} in {name}: {error}");
            }
            assert!(verify(&path).unwrap_err().is_damage(), "{what} in {name}");
        }
        forge_file(&path, &name, &whole);
        verify(&path).unwrap();
    }
}

type Change = dyn Fn(&mut serde_json::Value);

/// What a manifest says of the experts.
fn experts(manifest: &mut serde_json::Value) -> &mut serde_json::Value {
    let parameters = manifest["parameters"].as_array_mut().unwrap();
    parameters.iter_mut().find(|parameter| parameter["experts"].is_object()).unwrap()
}

#[test]
fn hostile_manifests_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = checkpoint_in(folder.path());
    let whole = [MANIFEST, MANIFEST_SUM].map(|name| fs::read(path.join(name)).unwrap());
    let forge = |change: &Change| {
        forge_manifest(&path, change);
        let errors = load_errors(&path);
        for (name, whole) in [MANIFEST, MANIFEST_SUM].iter().zip(&whole) {
            fs::write(path.join(name), whole).unwrap();
        }
        errors
    };
    let damages: [(&str, &Change); 12] = [
        ("another format", &|m| m["format"] = "a recipe".into()),
        ("more ranks than files", &|m| m["world_size"] = 3.into()),
        ("endless ranks", &|m| m["world_size"] = u64::MAX.into()),
        ("no ranks", &|m| (m["world_size"], m["files"]) = (0.into(), serde_json::json!([]))),
        ("a file outside of the folder", &|m| m["files"][0]["name"] = "../../etc/passwd".into()),
        ("files in another order", &|m| m["files"].as_array_mut().unwrap().swap(1, 2)),
        ("an unknown field", &|m| m["more"] = 1.into()),
        ("a missing field", &|m| drop(m.as_object_mut().unwrap().remove("step"))),
        ("a type that Burn does not have", &|m| m["parameters"][0]["dtype"] = "F4".into()),
        ("a shard of another length", &|m| experts(m)["shape"] = serde_json::json!([4, 31])),
        ("a layout that lacks experts", &|m| {
            experts(m)["experts"]["layout"] = serde_json::json!([[0, 1, 2], [0, 1, 2]]);
        }),
        ("a record that is not there", &|m| m["records"] = serde_json::json!(["x"])),
    ];
    for (what, change) in damages {
        for error in forge(change) {
            assert!(error.is_damage(), "{what}: {error}");
        }
    }
    for error in forge(&|m| m["version"] = 3.into()) {
        assert!(error.to_string().contains("has format version 3, this version of burn-fsep reads up to 2"), "{error}");
    }
    for error in forge(&|m| experts(m)["experts"]["num_experts"] = (1u64 << 60).into()) {
        assert!(
            matches!(&error, CheckpointError::Damaged { .. } | CheckpointError::Peer { damaged: true, .. }),
            "{error}"
        );
    }
    for error in forge(&|m| drop(m["parameters"].as_array_mut().unwrap().remove(0))) {
        assert!(error.to_string().contains("is not in the checkpoint"), "{error}");
    }
    verify(&path).unwrap();
}

#[test]
fn models_of_another_runtime_are_refused() {
    let (runtime, device) = (FsepRuntime::single(), Device::flex().autodiff());
    let folder = tempfile::tempdir().unwrap();
    let ours = FSEPMoEConfig::new(4, 5, 4).init(&runtime, &device);
    let path = save(folder.path(), &runtime, &ours, &AdamWConfig::new().init(), &TrainingProgress::new(1)).unwrap();
    // A runtime of as many layers, or of one more.
    for (layers, experts) in [(1, 6), (2, 4)] {
        let other = FsepRuntime::single();
        let made: Vec<_> = (0..layers).map(|_| FSEPMoEConfig::new(4, 5, experts).init(&other, &device)).collect();
        let theirs = &made[layers - 1];
        let optimizer = AdamWConfig::new().init();
        for error in [
            save(folder.path(), &runtime, theirs, &optimizer, &TrainingProgress::new(1)).unwrap_err(),
            load(&path, &runtime, theirs, &optimizer).unwrap_err(),
        ] {
            assert!(error.to_string().contains("was made with another runtime"), "{error}");
        }
    }
}
