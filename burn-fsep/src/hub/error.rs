use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::comm::CommError;

/// Why a model folder could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HubError {
    /// The file system refused.
    #[error("cannot {action} {}: {reason}", path.display())]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A folder without weights that can be read.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json{hint}", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// What to do, where it is known.
        hint: &'static str,
    },
    /// A file is not what its format says: cut off, changed, or not written by transformers.
    #[error("{} is damaged: {}{reason}", file.display(), of_tensor(tensor))]
    Damaged {
        /// The file.
        file: PathBuf,
        /// The tensor, if it is about one.
        tensor: Option<String>,
        /// What is wrong.
        reason: String,
    },
    /// A configuration that lacks something, or has what is not supported.
    #[error("{}: `{key}` {reason}", file.display())]
    Config {
        /// The file `config.json`.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A model of a family that is not known here.
    #[error("{}: the model is of the family `{found}`; known are {known}", file.display())]
    UnknownFamily {
        /// The file `config.json`.
        file: PathBuf,
        /// Its `model_type`.
        found: String,
        /// Those that are known.
        known: String,
    },
    /// A name that leads out of the folder.
    #[error("{} names the file `{name}`, which is refused: {reason}", file.display())]
    UnsafePath {
        /// The file that names it.
        file: PathBuf,
        /// The name.
        name: String,
        /// Why it is refused.
        reason: String,
    },
    /// A tensor of a type that parameters do not have.
    #[error("{}: tensor `{tensor}` is of type {dtype}, {reason}", file.display())]
    Dtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
        /// What was expected.
        reason: String,
    },
    /// A quantised tensor without its scales, scales without their tensor, or scales that do not fit.
    #[error("{}: the quantised tensor `{tensor}` cannot be decoded: {reason}", file.display())]
    Scales {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// The tensors are of another number of experts than the configuration says.
    #[error("{}: tensor `{tensor}` is of {found} experts, but config.json says {expected}", file.display())]
    NumExperts {
        /// The file.
        file: PathBuf,
        /// The tensor that shows it.
        tensor: String,
        /// Experts in the file.
        found: usize,
        /// Experts in the configuration.
        expected: usize,
    },
    /// The same part of the model under two names.
    #[error(
        "{}: the tensor `{tensor}` and `{other}` in {} are the same part of the model: leave one of them out",
        file.display(),
        other_file.display()
    )]
    TwoNames {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file of the other one.
        other_file: PathBuf,
        /// The other one.
        other: String,
    },
    /// The model has what the folder lacks.
    #[error("{} has no tensor `{tensor}`, which the model's `{parameter}` needs{hint}", folder.display())]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// The tensor.
        tensor: String,
        /// The path of the parameter in the model.
        parameter: String,
        /// What to do, where it is known.
        hint: &'static str,
    },
    /// The folder has what the model lacks.
    #[error(
        "{}: no parameter of the model is the tensor `{tensor}`{}: is it another model? Leave tensors out by `with_ignored`",
        file.display(),
        and_others(*others)
    )]
    Unused {
        /// The file.
        file: PathBuf,
        /// The first such tensor.
        tensor: String,
        /// How many more there are.
        others: usize,
    },
    /// A tensor of another shape than the model's parameter.
    #[error("{}: tensor `{tensor}` has the shape {found:?}, but the model's `{parameter}` needs {expected:?}", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The path of the parameter in the model.
        parameter: String,
        /// The shape that it needs.
        expected: Vec<usize>,
    },
    /// Two parameters of the model that are the same tensor of the folder.
    #[error(
        "{}: tensor `{tensor}` would be read to two parameters of the model, `{}` and `{}`",
        file.display(),
        parameters[0],
        parameters[1]
    )]
    MappedTwice {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The parameters.
        parameters: [String; 2],
    },
    /// A parameter that cannot be read or written.
    #[error("the model's `{parameter}` cannot be read or written: {reason}")]
    Unsupported {
        /// The parameter.
        parameter: String,
        /// Why.
        reason: String,
    },
    /// A file was replaced or cut off since the folder was opened.
    #[error("{} changed since it was opened: {}{reason}", file.display(), of_tensor(tensor))]
    Changed {
        /// The file.
        file: PathBuf,
        /// The tensor that was being read, if one was.
        tensor: Option<String>,
        /// What differs.
        reason: String,
    },
    /// There is something where a folder is to be written.
    #[error("{} exists already: a model is written to a new folder only", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// An option that cannot work.
    #[error("{0}")]
    Option(String),
    /// What has to be equal on all ranks is not.
    #[error("ranks 0 and {rank} differ in {what}: {hint}")]
    Divergence {
        /// What differs.
        what: String,
        /// The first rank that differs from rank 0.
        rank: usize,
        /// What to do.
        hint: &'static str,
    },
    /// Another rank failed; so none has read or written anything.
    #[error("rank {rank} failed: {message}")]
    Peer {
        /// The rank that failed.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// A thread that reads or writes files panicked.
    #[error("reading or writing the model's files panicked: {0}")]
    Panicked(String),
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] CommError),
}

fn of_tensor(tensor: &Option<String>) -> String {
    tensor.as_ref().map_or_else(String::new, |tensor| format!("tensor `{tensor}` "))
}

fn and_others(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" (and of {others} others)") }
}

impl HubError {
    /// The file, or folder, that it is about.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Io { path, .. } | Self::Exists { path } => Some(path),
            Self::NoWeights { folder, .. } | Self::Missing { folder, .. } => Some(folder),
            Self::Damaged { file, .. }
            | Self::Config { file, .. }
            | Self::UnknownFamily { file, .. }
            | Self::UnsafePath { file, .. }
            | Self::Dtype { file, .. }
            | Self::Scales { file, .. }
            | Self::NumExperts { file, .. }
            | Self::TwoNames { file, .. }
            | Self::Unused { file, .. }
            | Self::Shape { file, .. }
            | Self::MappedTwice { file, .. }
            | Self::Changed { file, .. } => Some(file),
            _ => None,
        }
    }

    /// The name, in the folder, of the tensor that it is about.
    pub fn tensor(&self) -> Option<&str> {
        match self {
            Self::Damaged { tensor, .. } | Self::Changed { tensor, .. } => tensor.as_deref(),
            Self::Dtype { tensor, .. }
            | Self::Scales { tensor, .. }
            | Self::NumExperts { tensor, .. }
            | Self::TwoNames { tensor, .. }
            | Self::Missing { tensor, .. }
            | Self::Unused { tensor, .. }
            | Self::Shape { tensor, .. }
            | Self::MappedTwice { tensor, .. } => Some(tensor),
            _ => None,
        }
    }

    /// Makes a system error one of a file.
    pub(super) fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |error| Self::Io { action, path: path.to_path_buf(), reason: error.to_string() }
    }

    pub(super) fn damaged(file: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { file: file.to_path_buf(), tensor: None, reason: reason.into() }
    }

    pub(super) fn damaged_tensor(file: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Self::Damaged { file: file.to_path_buf(), tensor: Some(tensor.into()), reason: reason.into() }
    }

    pub(super) fn unsupported(parameter: &str, reason: impl Into<String>) -> Self {
        Self::Unsupported { parameter: parameter.into(), reason: reason.into() }
    }
}
