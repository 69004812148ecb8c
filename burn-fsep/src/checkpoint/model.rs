use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{Bool, DType, Int, Shape, Tensor},
};
use safetensors::Dtype;

use super::{CheckpointError, tensors::file_dtype};
use crate::{FsepRuntime, moe::ExpertsInfo};

/// A parameter of a model, as this rank has it and Burn's records store it.
#[derive(Debug, Clone)]
pub(super) struct ModelParam {
    /// Where it stands in the model, as Burn's records have it.
    pub path: String,
    /// The path that it has in the dense model: without variants of enums, the experts as `DenseMoE` has them.
    pub name: String,
    pub id: ParamId,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub experts: Option<ExpertsInfo>,
}

/// The parameters of a model in their declared order, which is the same on all ranks.
///
/// # Errors
///
/// [`CheckpointError::Unsupported`] for a quantized parameter, or experts of another runtime.
pub(super) fn model_params<M: Module>(runtime: &FsepRuntime, model: &M) -> Result<Vec<ModelParam>, CheckpointError> {
    let mut collect = Collect { path: Vec::new(), experts: None, params: Vec::new(), error: None };
    model.visit(&mut collect);
    if let Some(error) = collect.error {
        return Err(error);
    }
    for param in &collect.params {
        if let Some(info) = param.experts
            && info.layer >= runtime.num_layers()
        {
            let reason = "its layer was made with another runtime".into();
            return Err(CheckpointError::Unsupported { what: param.path.clone(), reason });
        }
    }
    Ok(collect.params)
}

struct Collect {
    /// Names, and whether each is a variant of an enum.
    path: Vec<(String, bool)>,
    /// The experts met last, and the path of their module.
    experts: Option<(ExpertsInfo, Vec<(String, bool)>)>,
    params: Vec<ModelParam>,
    error: Option<CheckpointError>,
}

impl Collect {
    fn add(&mut self, id: ParamId, dtype: DType, shape: Shape) {
        let join = |variants: bool| {
            let names =
                self.path.iter().filter(|(_, is_variant)| variants || !is_variant).map(|(name, _)| name.as_str());
            names.collect::<Vec<_>>().join(".")
        };
        let (path, mut name) = (join(true), join(false));
        let parent = self.path.split_last().map_or(&[][..], |(_, parent)| parent);
        let experts = self.experts.as_ref().filter(|(_, module)| module == parent).map(|(info, _)| *info);
        if experts.is_some()
            && let Some(layer) = name.strip_suffix("experts.weight")
        {
            name = format!("{layer}weight");
        }
        match file_dtype(dtype) {
            Some(dtype) => {
                self.params.push(ModelParam { path, name, id, dtype, shape: shape.to_vec(), experts });
            }
            None => {
                let reason = format!("tensor files have no type {dtype:?}");
                self.error = Some(CheckpointError::Unsupported { what: path, reason });
            }
        }
    }
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, container: &str) {
        if let Some(info) = ExpertsInfo::from_module(name, container) {
            // It is met inside of the module's field for it.
            let module = self.path.split_last().map_or(&[][..], |(_, module)| module);
            self.experts = Some((info, module.to_vec()));
        }
        self.path.push((name.to_string(), container.starts_with("Enum:")));
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    // As Burn's records do, the form in which a parameter is saved: layers may keep their weights transposed.
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let saved = param.transform_for_save().val();
        self.add(param.id, saved.dtype(), saved.shape());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let saved = param.transform_for_save().val();
        self.add(param.id, saved.dtype(), saved.shape());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        let saved = param.transform_for_save().val();
        self.add(param.id, saved.dtype(), saved.shape());
    }
}
