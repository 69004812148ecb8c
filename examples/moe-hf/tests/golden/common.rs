use std::path::{Path, PathBuf};

use burn::tensor::Device;
use burn_fsep::{FsepRuntime, FsepRuntimeConfig, launch::RankConfig, launch::RankDevice};
use clap::Parser;
use moe_hf::{Cli, Command, ModelFolder, MoeHfError, ParallelArgs, model::CausalLm};
use safetensors::{Dtype, SafeTensors};

/// Families that this program runs.
pub const FAMILIES: [&str; 4] = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"];

/// The folder of a golden model.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// Numbers that transformers has computed.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn of(name: &str) -> Self {
        Self(std::fs::read(folder(name).join("golden.safetensors")).unwrap())
    }

    pub fn numbers(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// `[.., rows, length]` as `[..][rows][length]`, flat but for the last two axes.
    pub fn ids(&self, name: &str) -> Vec<Vec<Vec<u32>>> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::I64, "{name}");
        let [.., rows, length] = *tensor.shape() else { panic!("{name}: {:?}", tensor.shape()) };
        let value = |b: &[u8]| i64::from_le_bytes(b.try_into().unwrap()) as u32;
        let values: Vec<u32> = tensor.data().chunks_exact(8).map(value).collect();
        let texts: Vec<Vec<u32>> = values.chunks_exact(length).map(<[u32]>::to_vec).collect();
        texts.chunks_exact(rows).map(<[Vec<u32>]>::to_vec).collect()
    }
}

/// The options that a rank has without any.
pub fn parallel() -> ParallelArgs {
    let cli = Cli::parse_from(["moe-hf", "logits", "--model", "-", "--ids", "-", "--output", "-"]);
    let Command::Logits(args) = cli.command else { panic!("logits was asked for") };
    args.parallel
}

/// Runs `program` as `ranks` threads, on the backend of this build; returns rank 0's result.
pub fn on_ranks<T: Send>(ranks: usize, program: impl Fn(&FsepRuntime, &Device) -> Result<T, MoeHfError> + Sync) -> T {
    #[cfg(feature = "libtorch")]
    #[allow(deprecated)]
    let device = Device::libtorch();
    #[cfg(not(feature = "libtorch"))]
    let device = Device::flex();
    let config = RankConfig::new().with_threads(ranks).with_device(RankDevice::Given(device));
    let result = config.run(|rank| program(&rank.runtime(FsepRuntimeConfig::new())?, &rank.device));
    result.unwrap_or_else(|error| panic!("{error}"))
}

/// The model of a golden folder.
pub fn load(name: &str, runtime: &FsepRuntime, device: &Device) -> Result<CausalLm, MoeHfError> {
    ModelFolder::open(&folder(name))?.load(&parallel(), runtime, device)
}

/// The largest difference beside the largest expected number.
pub fn error(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let differences = actual.iter().zip(expected).map(|(a, e)| (a - e).abs());
    differences.fold(0f32, |worst, difference| if difference.is_nan() { f32::NAN } else { worst.max(difference) })
        / largest
}
