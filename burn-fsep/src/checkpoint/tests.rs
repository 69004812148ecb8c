//! Disks that fail, and files that lie with valid checksums.

use std::{
    fs, io,
    io::Write,
    path::Path,
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
    manifest::{MANIFEST, MANIFEST_SUM, Manifest},
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

#[test]
fn a_full_disk_of_one_rank_is_an_error_on_all_and_leaves_the_last_checkpoint() {
    // Full in the tensor files (of either rank), in the manifest, in its checksum.
    for (full, background) in [(0, false), (1, false), (1, true), (0, true)] {
        for bytes in [0, 10, 1500, u64::MAX] {
            let folder = tempfile::tempdir().unwrap();
            let errors = on_ranks(|runtime| {
                let (model, optimizer) = trained(runtime)?;
                let first = save(folder.path(), runtime, &model, &optimizer, &TrainingProgress::new(1))?;
                let manifest = fs::read(first.join(MANIFEST)).unwrap().len() as u64;
                let files: u64 = verify(&first)?.bytes;
                // Rank 0 alone writes the manifest; it fits no more by one byte.
                let bytes = if bytes == u64::MAX { files / 2 * 2 + manifest } else { bytes };
                let disk = Arc::new(AtomicU64::new(if runtime.rank() == full { bytes } else { u64::MAX }));
                let config = CheckpointConfig::new(folder.path()).with_background(background);
                let mut checkpoints = config.init(runtime)?.with_files(Arc::new(SmallDisk(disk)));
                let result = checkpoints.save(&model, &optimizer, &TrainingProgress::new(2));
                let result = result.and_then(|()| checkpoints.finish().map(drop));
                // The group lives on.
                let after = load(&first, runtime, &model, &optimizer)?.progress.step;
                assert_eq!((after, list(folder.path())?.len() as u64), (1, 1 + u64::from(result.is_ok())));
                Ok(result.err())
            });
            let left = fs::read_dir(folder.path()).unwrap().count();
            match errors.iter().flatten().count() {
                // All that a rank wrote did fit.
                0 => assert!(bytes == u64::MAX, "{bytes} bytes"),
                failed => {
                    assert_eq!((failed, left), (2, 1));
                    let [own, peers] = [full, 1 - full].map(|rank| errors[rank].as_ref().unwrap());
                    assert!(matches!(own, CheckpointError::Io { action: "write", .. }), "{own}");
                    assert!(matches!(peers, CheckpointError::Peer { rank, .. } if *rank == full), "{peers}");
                    assert!(peers.to_string().contains("no storage space"), "{peers}");
                }
            }
        }
    }
}
