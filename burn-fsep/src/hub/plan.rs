//! What of a folder each parameter of a model is: known, and checked, for the whole model before anything is read or written.

use std::{collections::HashMap, ops::Range, path::Path};

use super::{
    Family, HubError, ModelConfig,
    experts::{ExpertPart, expert_parts},
    header::TensorFile,
    model::ModelParam,
    names::{Target, is_ignored, matches, target},
    stored::{StoredTensor, StoredTensors},
    view::View,
};
use crate::comm::digest;

/// A model's parameters with where they stand.
#[derive(Debug)]
pub(super) struct Plan {
    /// In the model's order.
    pub params: Vec<PlannedParam>,
    /// Tensors of the folder that are none of the model's.
    pub ignored: Vec<String>,
}

#[derive(Debug)]
pub(super) struct PlannedParam {
    pub param: ModelParam,
    pub source: Source,
}

#[derive(Debug)]
pub(super) enum Source {
    /// This view of this tensor.
    Tensor(String, View),
    /// Parts of each expert.
    Experts(Vec<Vec<ExpertPart>>),
}

impl Plan {
    /// # Errors
    ///
    /// [`HubError::Missing`], [`HubError::Unused`], [`HubError::Shape`], [`HubError::TwoNames`], [`HubError::MappedTwice`],
    /// [`HubError::Unsupported`].
    pub fn new(
        lookup: &Lookup<'_>,
        params: Vec<ModelParam>,
        prefix: &str,
        ignored: &[String],
    ) -> Result<Self, HubError> {
        let mut planned = Vec::with_capacity(params.len());
        let mut used: HashMap<String, String> = HashMap::new();
        for param in params {
            let source = lookup.source(&param, prefix)?;
            let mut new = source.tensors();
            // A tensor of all experts is one of each.
            new.dedup();
            new.sort_unstable();
            new.dedup();
            for tensor in new {
                if let Some(before) = used.insert(tensor.into(), param.path.clone()) {
                    return Err(HubError::MappedTwice {
                        file: lookup.file_of(tensor).into(),
                        tensor: tensor.into(),
                        parameters: [before, param.path.clone()],
                    });
                }
            }
            planned.push(PlannedParam { param, source });
        }
        let rest: Vec<&String> = lookup.stored.tensors.keys().filter(|name| !used.contains_key(*name)).collect();
        // What transformers ties on loading, whatever the folder has.
        let is_tied = |name: &str| lookup.config.tie_word_embeddings && name == "lm_head.weight";
        let may_be_there = |name: &str| {
            is_ignored(lookup.config, name) || is_tied(name) || ignored.iter().any(|pattern| matches(pattern, name))
        };
        let unused: Vec<_> = rest.iter().filter(|name| !may_be_there(name)).collect();
        if let Some(first) = unused.first() {
            let (file, tensor) = (lookup.file_of(first).into(), (**first).clone());
            return Err(HubError::Unused { file, tensor, others: unused.len() - 1 });
        }
        Ok(Self { params: planned, ignored: rest.into_iter().filter(|name| !is_tied(name)).cloned().collect() })
    }
}

impl Plan {
    /// What ranks compare.
    pub fn digest(&self) -> u64 {
        let params = self.params.iter().map(|PlannedParam { param, .. }| {
            let ModelParam { path, dtype, shape, .. } = param;
            format!("{path} {dtype} {shape:?};")
        });
        digest(params.collect::<String>().as_bytes())
    }
}

impl Source {
    /// Names of the tensors that it is of.
    pub fn tensors(&self) -> Vec<&str> {
        match self {
            Self::Tensor(name, _) => vec![name],
            Self::Experts(experts) => experts.iter().flatten().map(|part| part.tensor.as_str()).collect(),
        }
    }
}

/// The parts of an expert that these positions of its flat vector are in: which positions of the part's view, and how many
/// positions after the first they start.
pub(super) fn parts_at(
    parts: &[ExpertPart],
    positions: Range<usize>,
) -> impl Iterator<Item = (&ExpertPart, Range<usize>, usize)> {
    parts.iter().filter_map(move |part| {
        let start = positions.start.max(part.at);
        let end = positions.end.min(part.at + part.view.len());
        (start < end).then(|| (part, start - part.at..end - part.at, start - positions.start))
    })
}

/// The tensors of a folder, with errors that say where they are.
pub(super) struct Lookup<'a> {
    pub folder: &'a Path,
    pub files: &'a [TensorFile],
    pub stored: &'a StoredTensors,
    pub config: &'a ModelConfig,
    /// Whether tensors are those that are to be written, which are never quantised.
    pub as_written: bool,
}

impl Lookup<'_> {
    pub fn family(&self) -> Family {
        self.config.family
    }

    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.stored.get(name)
    }

    /// Names that begin so.
    pub fn with_prefix(&self, prefix: &str) -> impl Iterator<Item = String> {
        let names = self.stored.tensors.range(prefix.to_string()..).map(|(name, _)| name.clone());
        names.take_while(move |name| name.starts_with(prefix))
    }

    /// The file that has a tensor's values.
    pub fn file_of(&self, name: &str) -> &Path {
        self.get(name).map_or(self.folder, |tensor| &self.files[tensor.piece().file].path)
    }

    pub fn missing(&self, tensor: &str, parameter: &str) -> HubError {
        let is_tied = tensor == "lm_head.weight" && self.config.tie_word_embeddings;
        let hint = if is_tied { ": config.json ties it to the embeddings, so make the model without it" } else { "" };
        HubError::Missing { folder: self.folder.into(), tensor: tensor.into(), parameter: parameter.into(), hint }
    }

    pub fn two_names(&self, one: &str, other: &str) -> HubError {
        HubError::TwoNames {
            file: self.file_of(one).into(),
            tensor: one.into(),
            other_file: self.file_of(other).into(),
            other: other.into(),
        }
    }

    /// The tensor of this name and shape.
    pub fn expect(&self, name: &str, parameter: &str, shape: &[usize]) -> Result<&StoredTensor, HubError> {
        let tensor = self.get(name).ok_or_else(|| self.missing(name, parameter))?;
        if tensor.shape == shape {
            return Ok(tensor);
        }
        Err(HubError::Shape {
            file: self.file_of(name).into(),
            tensor: name.into(),
            found: tensor.shape.clone(),
            parameter: parameter.into(),
            expected: shape.to_vec(),
        })
    }

    fn source(&self, param: &ModelParam, prefix: &str) -> Result<Source, HubError> {
        let path = &param.path;
        match target(param, self.family(), prefix) {
            Target::Experts { blocks } => {
                let (experts, shape) = match &param.experts {
                    Some(info) => (info.num_experts, info.shape),
                    None => {
                        // The dense layer has all experts, and says nothing of them.
                        let shape = self.config.expert_shape();
                        if param.shape.get(1) != Some(&shape.num_params()) {
                            let reason = format!("its experts are not those of config.json: {shape:?}");
                            return Err(HubError::unsupported(path, reason));
                        }
                        (param.shape[0], shape)
                    }
                };
                if experts != self.config.moe.num_experts {
                    let reason = format!("it has {experts} experts, config.json {}", self.config.moe.num_experts);
                    return Err(HubError::unsupported(path, reason));
                }
                Ok(Source::Experts(expert_parts(self, path, &blocks, experts, shape)?))
            }
            Target::Tensor { names, is_transposed } => {
                let mut there = names.iter().filter(|name| self.get(name).is_some());
                let name = there.next().ok_or_else(|| self.missing(&names[0], path))?;
                if let Some(other) = there.next() {
                    return Err(self.two_names(name, other));
                }
                let shape = &param.shape;
                // The transpose of the transpose.
                if !is_transposed || param.is_transposed || shape.len() != 2 {
                    let tensor = self.expect(name, path, shape)?;
                    return Ok(Source::Tensor(name.clone(), View::run(0, tensor.len())));
                }
                let (rows, columns) = (shape[0], shape[1]);
                self.expect(name, path, &[columns, rows])?;
                Ok(Source::Tensor(name.clone(), View::transposed(0, rows, columns)))
            }
        }
    }
}
