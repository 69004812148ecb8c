//! A model's parameters as this rank has them, without a look at their values: those that have none yet do not get one.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Bool, Device, Int, Tensor},
};
use safetensors::Dtype;

use super::{HubError, decode::file_dtype};
use crate::{FsepRuntime, burn_compat::ModulePath, checkpoint::Sharding, moe::ExpertsInfo};

/// A parameter of a model.
#[derive(Debug, Clone)]
pub(super) struct ModelParam {
    /// Where it stands in the model, as Burn's records have it.
    pub path: String,
    /// The names of the fields that it is in, without variants of enums, each with the type of what the field stands in.
    pub fields: Vec<(String, String)>,
    pub dtype: Dtype,
    /// In the form in which Burn's records have it.
    pub shape: Vec<usize>,
    /// Whether records have its transpose (`LinearLayout::Col`).
    pub is_transposed: bool,
    pub experts: Option<ExpertsInfo>,
}

/// The parameters of a model in their declared order, which is the same on all ranks. `runtime` is that of its layers.
///
/// # Errors
///
/// [`HubError::Unsupported`] for what is no floating point number, or experts of another runtime.
pub(super) fn model_params<M: Module>(runtime: Option<&FsepRuntime>, model: &M) -> Result<Vec<ModelParam>, HubError> {
    let mut found = Collect::default();
    model.visit(&mut found);
    if let Some(error) = found.error {
        return Err(error);
    }
    for param in &found.params {
        let Some(info) = &param.experts else { continue };
        check_experts(param, info, runtime).map_err(|reason| HubError::unsupported(&param.path, reason))?;
    }
    Ok(found.params)
}

fn check_experts(param: &ModelParam, info: &ExpertsInfo, runtime: Option<&FsepRuntime>) -> Result<(), &'static str> {
    let ranks = match runtime {
        None => 1,
        Some(runtime) if runtime.layer_spec(info.layer).is_some_and(|spec| ExpertsInfo::new(&spec) == *info) => {
            runtime.groups().experts().size()
        }
        Some(_) => return Err("its layer was made with another runtime"),
    };
    match (param.shape == Sharding::new(info, ranks).shape(), runtime) {
        (true, _) => Ok(()),
        (false, None) => Err("it is one rank's part of the experts: give the ranks' runtime (`with_runtime`)"),
        (false, Some(_)) => Err("it stands with a layer's experts, but is not this rank's part of them"),
    }
}

#[derive(Default)]
struct Collect {
    path: ModulePath<ExpertsInfo>,
    params: Vec<ModelParam>,
    error: Option<HubError>,
}

impl Collect {
    fn refuse(&mut self, what: &str) {
        self.error = Some(HubError::unsupported(&self.path.path(), format!("it is {what}")));
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
        let is_initialized = param.is_initialized();
        let device = param.lazy_device();
        // Layers draw initial values in the device's own type.
        let found = if is_initialized { param.dtype() } else { Tensor::<1>::zeros([1], &device).dtype() };
        let Some(dtype) = file_dtype(found) else { return self.refuse(&format!("of the type {found:?}")) };
        let is_transposed = is_transposed_in_records(param, &device);
        let mut shape = param.lazy_shape().to_vec();
        // Before it has a value its shape is that in records.
        if is_transposed && is_initialized {
            shape.reverse();
        }
        self.params.push(ModelParam {
            path: self.path.path(),
            fields: self.path.fields().map(|(name, container)| (name.into(), container.into())).collect(),
            dtype,
            shape,
            is_transposed,
            experts: self.path.metadata().copied(),
        });
    }

    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        self.refuse("a whole number, and model folders have floating point numbers only");
    }

    fn visit_bool<const D: usize>(&mut self, _param: &Param<Tensor<D, Bool>>) {
        self.refuse("true or false, and model folders have floating point numbers only");
    }
}

/// Whether a parameter is transposed while it is loaded from a record, tried with another value: a square matrix does not tell.
fn is_transposed_in_records<const D: usize>(param: &Param<Tensor<D>>, device: &Device) -> bool {
    if D != 2 {
        return false;
    }
    let mut shape = [1; D];
    shape[0] = 2;
    param.clone().transform_for_load(Tensor::zeros(shape, device), param.id).dims() != shape
}
