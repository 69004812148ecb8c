use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{DType, TensorData};

/// The folders of models that transformers wrote; see `tests/golden/README.md`.
pub const GOLDEN: [&str; 12] = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "mixtral_sharded",
    "mixtral_fused",
    "qwen3_moe_bf16",
    "gpt_oss_mxfp4",
    "deepseek_v3_fp8",
];

/// A golden folder.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// A tensor of a file: the name of its type, its shape and its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileTensor {
    /// `F32`, `BF16`, ..
    pub dtype: String,
    /// As the file says.
    pub shape: Vec<usize>,
    /// Little-endian.
    pub bytes: Vec<u8>,
}

impl FileTensor {
    /// Its values.
    ///
    /// # Panics
    ///
    /// If it is of a type that golden files do not have.
    pub fn data(&self) -> TensorData {
        let dtype = match self.dtype.as_str() {
            "F32" => DType::F32,
            "BF16" => DType::BF16,
            "F16" => DType::F16,
            "I64" => DType::I64,
            other => panic!("{other}"),
        };
        TensorData::from_bytes_vec(self.bytes.clone(), self.shape.clone(), dtype)
    }

    /// Its values in single precision.
    pub fn values(&self) -> Vec<f32> {
        self.data().iter::<f32>().collect()
    }
}

/// All tensors of a safetensors file, read in the simplest way.
///
/// # Panics
///
/// If it is none.
pub fn read_safetensors(path: &Path) -> BTreeMap<String, FileTensor> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let split = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let table: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes[8..split]).expect("a table");
    let tensors = table.into_iter().filter(|(name, _)| name != "__metadata__").map(|(name, info)| {
        let sizes = |key: &str| -> Vec<usize> { serde_json::from_value(info[key].clone()).expect("sizes") };
        let places = sizes("data_offsets");
        let tensor = FileTensor {
            dtype: info["dtype"].as_str().expect("a type").into(),
            shape: sizes("shape"),
            bytes: bytes[split + places[0]..split + places[1]].to_vec(),
        };
        (name, tensor)
    });
    tensors.collect()
}

/// All tensors of a model folder, of one file or several.
///
/// # Panics
///
/// If a file is none.
pub fn read_model_tensors(folder: &Path) -> BTreeMap<String, FileTensor> {
    let files = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let is_model = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("model") && name.ends_with(".safetensors")
    };
    files.filter(is_model).flat_map(|path| read_safetensors(&path)).collect()
}

/// Writes a safetensors file with these tensors, in the order of their names.
///
/// # Panics
///
/// If it cannot be written.
pub fn write_safetensors(path: &Path, tensors: &BTreeMap<String, FileTensor>) {
    let mut table = serde_json::json!({ "__metadata__": { "format": "pt" } });
    let mut data = Vec::new();
    for (name, FileTensor { dtype, shape, bytes }) in tensors {
        let end = data.len() + bytes.len();
        table[name] = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [data.len(), end] });
        data.extend_from_slice(bytes);
    }
    let table = serde_json::to_vec(&table).expect("a table");
    let head = (table.len() as u64).to_le_bytes();
    fs::write(path, [&head[..], &table, &data].concat()).expect("a file");
}
