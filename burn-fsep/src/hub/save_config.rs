use burn::tensor::FloatDType;

use super::progress::{Listener, Progress};

/// 5 GB, as the hub takes them.
const MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// How a model is saved; equal on all ranks.
#[derive(Debug, Clone)]
pub struct SaveConfig {
    pub(super) max_shard_size: u64,
    pub(super) dtype: Option<FloatDType>,
    pub(super) ignored: Vec<String>,
    pub(super) prefix: String,
    pub(super) progress: Listener,
}

impl Default for SaveConfig {
    fn default() -> Self {
        Self {
            max_shard_size: MAX_SHARD_SIZE,
            dtype: None,
            ignored: Vec::new(),
            prefix: String::new(),
            progress: Listener::default(),
        }
    }
}

impl SaveConfig {
    /// Files of up to 5 GB, with the types that the folder has.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many bytes of tensors a file has at most; a larger tensor has a file of its own.
    pub fn with_max_shard_size(mut self, bytes: u64) -> Self {
        self.max_shard_size = bytes;
        self
    }

    /// Sets the type of all tensors, but for DeepSeek-V3's bias on the choice; `None` is that of the folder, and BF16 where that is
    /// quantised.
    pub fn with_dtype(mut self, dtype: Option<FloatDType>) -> Self {
        self.dtype = dtype;
        self
    }

    /// Adds names of tensors that the folder has and the model has not, as for
    /// [`LoadConfig::with_ignored`](super::LoadConfig::with_ignored): they are copied.
    pub fn with_ignored<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.ignored.extend(names.into_iter().map(Into::into));
        self
    }

    /// Sets what stands before the paths of the model's parameters, as for
    /// [`LoadConfig::with_prefix`](super::LoadConfig::with_prefix).
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets who is told after each step how far this rank is.
    pub fn with_progress(mut self, progress: impl Fn(Progress<'_>) + Send + Sync + 'static) -> Self {
        self.progress = Listener::new(progress);
        self
    }
}
