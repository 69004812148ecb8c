use std::{fs, path::PathBuf};

use burn::tensor::TensorData;
use safetensors::{Dtype, SafeTensors};

/// A folder of `tests/golden`: a tiny model of a family, and what transformers computes with it.
#[derive(Debug)]
pub struct Golden {
    folder: PathBuf,
    bytes: Vec<u8>,
    facts: serde_json::Value,
}

impl Golden {
    /// Reads what is golden about a family.
    ///
    /// # Panics
    ///
    /// If there is no such folder.
    pub fn new(family: &str) -> Self {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/golden")).join(family);
        let read = |name: &str| fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{family}/{name}: {e}"));
        let facts = serde_json::from_slice(&read("golden.json")).expect("facts are JSON");
        Self { bytes: read("golden.safetensors"), facts, folder }
    }

    /// The model's folder.
    pub fn folder(&self) -> &PathBuf {
        &self.folder
    }

    /// A fact that is a string.
    ///
    /// # Panics
    ///
    /// If there is none of this name.
    pub fn fact(&self, name: &str) -> &str {
        self.facts[name].as_str().unwrap_or_else(|| panic!("there is no `{name}`"))
    }

    /// A tensor of numbers of single precision, or of integers.
    ///
    /// # Panics
    ///
    /// If there is none of this name.
    pub fn tensor(&self, name: &str) -> TensorData {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("the file is whole");
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("`{name}`: {e}"));
        let bytes = tensor.data();
        let shape = tensor.shape().to_vec();
        match tensor.dtype() {
            Dtype::F32 => {
                let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")));
                TensorData::new(values.collect::<Vec<_>>(), shape)
            }
            Dtype::I64 => {
                let values = bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")));
                TensorData::new(values.collect::<Vec<_>>(), shape)
            }
            other => panic!("`{name}` is of type {other:?}"),
        }
    }

    /// Whether there is a tensor of this name.
    ///
    /// # Panics
    ///
    /// If the file is damaged.
    pub fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.bytes).expect("the file is whole").tensor(name).is_ok()
    }
}
