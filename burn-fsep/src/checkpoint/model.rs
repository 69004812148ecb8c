//! A model's parameters, in the form in which Burn's records have them: layers may keep their weights transposed.

use std::{collections::HashMap, sync::Arc};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Bool, Device, Int, Shape, Tensor, TensorData, kind::Basic},
};
use safetensors::Dtype;

use super::{
    CheckpointError, HeldState,
    reshard::Sharding,
    tensors::{HostTensor, file_dtype},
};
use crate::{
    FsepRuntime,
    burn_compat::ModulePath,
    comm::Communicator,
    moe::{ExpertsInfo, Placement},
    shard::FlatParts,
};

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
    /// As the model has it, which records may keep transposed: an optimizer's state has this one.
    pub value_shape: Vec<usize>,
    pub experts: Option<ExpertsInfo>,
    /// Whether it is a statistic of what this rank has seen, and no trained parameter. Ranks' may differ.
    pub is_running_statistic: bool,
}

impl ModelParam {
    /// The parts in which ranks that cut their optimizer's state keep this parameter's, and who they are; `None` where each keeps it
    /// whole.
    pub fn state_parts<'a>(
        &self,
        runtime: &'a FsepRuntime,
        held: HeldState,
    ) -> Option<(FlatParts, &'a Arc<dyn Communicator>)> {
        let replicas = Placement::of(self.experts.as_ref()).replicas(runtime).filter(|_| held == HeldState::OwnPart)?;
        Some((FlatParts::new(self.value_shape.iter().product(), replicas.size())?, replicas))
    }
}

/// The parameters of a model in their declared order, which is the same on all ranks.
///
/// # Errors
///
/// [`CheckpointError::Unsupported`] for a quantized parameter, or experts of another runtime.
pub(super) fn model_params<M: Module>(runtime: &FsepRuntime, model: &M) -> Result<Vec<ModelParam>, CheckpointError> {
    Ok(collect(runtime, model, Collect::default())?.params)
}

/// The same with their values, in host memory.
///
/// # Errors
///
/// As [`model_params`], and if the device fails.
pub(super) fn model_values<M: Module>(
    runtime: &FsepRuntime,
    model: &M,
) -> Result<Vec<(ModelParam, HostTensor)>, CheckpointError> {
    let found = collect(runtime, model, Collect { values: Some(Vec::new()), ..Collect::default() })?;
    Ok(found.params.into_iter().zip(found.values.into_iter().flatten()).collect())
}

fn collect<M: Module>(runtime: &FsepRuntime, model: &M, mut found: Collect) -> Result<Collect, CheckpointError> {
    model.visit(&mut found);
    if let Some(error) = found.error {
        return Err(error);
    }
    for param in &found.params {
        let Some(info) = param.experts else { continue };
        let reason = if runtime.layer_spec(info.layer).is_none_or(|spec| ExpertsInfo::new(&spec) != info) {
            "its layer was made with another runtime"
        } else if param.shape != Sharding::new(&info, runtime.groups().experts().size()).shape() {
            "it stands with a layer's experts, but is not this rank's part of them"
        } else {
            continue;
        };
        return Err(CheckpointError::Unsupported { what: param.path.clone(), reason: reason.into() });
    }
    Ok(found)
}

#[derive(Default)]
struct Collect {
    path: ModulePath<ExpertsInfo>,
    params: Vec<ModelParam>,
    /// `None` if they are not wanted.
    values: Option<Vec<HostTensor>>,
    error: Option<CheckpointError>,
}

impl Collect {
    fn add<const D: usize, K: Basic>(&mut self, id: ParamId, value_shape: Shape, saved: Tensor<D, K>) {
        if let Err(error) = self.try_add(id, value_shape, saved) {
            self.error = Some(error);
        }
    }

    fn try_add<const D: usize, K: Basic>(
        &mut self,
        id: ParamId,
        value_shape: Shape,
        saved: Tensor<D, K>,
    ) -> Result<(), CheckpointError> {
        let (path, mut name) = (self.path.path(), self.path.path_without_variants());
        let experts = self.path.metadata().copied();
        if experts.is_some()
            && let Some(layer) = name.strip_suffix("experts.weight")
        {
            name = format!("{layer}weight");
        }
        let (dtype, shape) = (file_dtype(&path, saved.dtype())?, saved.shape().to_vec());
        if let Some(values) = &mut self.values {
            let failed = |reason: String| CheckpointError::Unsupported { what: path.clone(), reason };
            let data = saved.try_into_data().map_err(|error| failed(format!("the device failed: {error}")))?;
            values.push(HostTensor::new(&path, data)?);
        }
        let is_running_statistic = self.path.is_running_statistic();
        let value_shape = value_shape.to_vec();
        self.params.push(ModelParam { path, name, id, dtype, shape, value_shape, experts, is_running_statistic });
        Ok(())
    }
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.add(param.id, param.lazy_shape(), param.transform_for_save().val());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.add(param.id, param.lazy_shape(), param.transform_for_save().val());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.add(param.id, param.lazy_shape(), param.transform_for_save().val());
    }
}

/// The model with these values of its parameters. Burn's clones share running statistics: those of `model` are set, too.
///
/// # Errors
///
/// [`CheckpointError::Unsupported`] if a module gives other parameters to a mapper than to a visitor.
pub(super) fn load_values<M: Module>(
    model: &M,
    params: &[ModelParam],
    values: Vec<TensorData>,
) -> Result<M, CheckpointError> {
    let values = params.iter().map(|param| param.path.clone()).zip(values).collect();
    let mut load = Load { path: ModulePath::default(), values, unknown: None };
    let model = model.clone().map(&mut load);
    match load.unknown.or(load.values.into_keys().next()) {
        None => Ok(model),
        Some(what) => {
            let reason = "a module's `visit` and `map` do not meet the same parameters".into();
            Err(CheckpointError::Unsupported { what, reason })
        }
    }
}

struct Load {
    path: ModulePath<ExpertsInfo>,
    values: HashMap<String, TensorData>,
    unknown: Option<String>,
}

impl Load {
    fn take<const D: usize, K: Basic>(&mut self, device: &Device) -> Option<Tensor<D, K>> {
        let path = self.path.path();
        let value = self.values.remove(&path);
        if value.is_none() {
            self.unknown = Some(path);
        }
        value.map(|value| {
            let dtype = value.dtype();
            Tensor::from_data(value, (device, dtype))
        })
    }
}

/// As Burn's records are loaded, but for the id, which stays.
macro_rules! load_param {
    ($method:ident, $kind:ty) => {
        fn $method<const D: usize>(&mut self, param: Param<$kind>) -> Param<$kind> {
            let id = param.id;
            match self.take(&param.lazy_device()) {
                Some(value) => param.transform_for_load(value, id),
                None => param,
            }
        }
    };
}

impl ModuleMapper for Load {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    load_param!(map_float, Tensor<D>);
    load_param!(map_int, Tensor<D, Int>);
    load_param!(map_bool, Tensor<D, Bool>);
}
