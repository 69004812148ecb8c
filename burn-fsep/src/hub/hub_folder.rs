use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    HubError, ModelConfig, folder::open_files, header::TensorFile, json::Object, plan::Lookup, stored::StoredTensors,
};
use crate::comm::digest;

/// A model folder: what it says of itself, checked, and where its tensors are. Cloning gives another handle on the same.
///
/// ```no_run
/// # use burn::tensor::Device;
/// # use burn_fsep::{FsepRuntime, hub::{HubError, HubFolder, LoadConfig}};
/// # fn read(runtime: &FsepRuntime, device: &Device) -> Result<(), HubError> {
/// let folder = HubFolder::open("Mixtral-8x7B-v0.1")?;
/// let block = folder.config().moe_config().init(runtime, device);
/// // One block alone, and not the rest.
/// let one = LoadConfig::new()
///     .with_runtime(runtime)
///     .with_prefix("model.layers.0.mlp.")
///     .with_ignored(["*"]);
/// let block = folder.load(block, &one)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct HubFolder {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub path: PathBuf,
    pub config: ModelConfig,
    pub config_json: Object,
    pub files: Vec<TensorFile>,
    pub stored: StoredTensors,
}

impl HubFolder {
    /// Reads what the folder says of itself, and no values.
    ///
    /// # Errors
    ///
    /// [`HubError::NoWeights`]; [`HubError::UnknownFamily`] and [`HubError::Config`] for `config.json`;
    /// [`HubError::Damaged`] if a file is not what it, or the index, says; [`HubError::UnsafePath`]; [`HubError::Dtype`] and
    /// [`HubError::Scales`] for what cannot be decoded; [`HubError::NumExperts`]; [`HubError::TwoNames`]; [`HubError::Io`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, HubError> {
        let path = folder.as_ref().to_path_buf();
        let (config, config_json) = ModelConfig::open_with_json(&path)?;
        let files = open_files(&path)?;
        let stored = StoredTensors::new(&files, config.quantization.as_ref())?;
        let inner = Inner { path, config, config_json, files, stored };
        inner.check_experts()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Names of all tensors, sorted; a quantised one is one.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.inner.stored.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor's values.
    pub fn tensor_shape(&self, name: &str) -> Option<&[usize]> {
        self.inner.stored.get(name).map(|tensor| tensor.shape.as_slice())
    }
}

impl Inner {
    pub fn lookup(&self) -> Lookup<'_> {
        let Self { path, files, stored, config, .. } = self;
        Lookup { folder: path, files, stored, config, as_written: false }
    }

    /// Whether the tensors are of as many experts as the configuration says.
    fn check_experts(&self) -> Result<(), HubError> {
        let (family, expected) = (self.config.family, self.config.moe.num_experts);
        for (name, tensor) in &self.stored.tensors {
            let Some((block, rest)) = name.split_once(".experts.") else { continue };
            let wrong = |name: &str, found: usize| {
                let file = self.files[tensor.piece().file].path.clone();
                Err(HubError::NumExperts { file, tensor: name.into(), found, expected })
            };
            let found = match rest.split('.').next().unwrap_or("").parse::<usize>() {
                Ok(number) if number >= expected => return wrong(name, number + 1),
                Ok(_) => expected,
                Err(_) => *tensor.shape.first().unwrap_or(&0),
            };
            if found != expected {
                return wrong(name, found);
            }
            let router = format!("{block}.{}.weight", family.router());
            match self.stored.get(&router).map(|router| router.shape.as_slice()) {
                Some([found, _]) if *found != expected => {
                    let file = self.lookup().file_of(&router).to_path_buf();
                    return Err(HubError::NumExperts { file, tensor: router, found: *found, expected });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What ranks compare: the folder may be another one on each node.
    pub fn digest(&self) -> u64 {
        let mut all = serde_json::to_vec(&self.config_json).unwrap_or_default();
        for (name, tensor) in &self.stored.tensors {
            all.extend(format!("{name} {:?} {:?};", tensor.shape, tensor.piece()).bytes());
        }
        self.files.iter().for_each(|file| all.extend(file.len.to_le_bytes()));
        digest(&all)
    }
}
