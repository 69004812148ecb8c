use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Tensor, TensorData},
};

use super::params::{ParamVisitor, Placement, PlacementPath, visit_params};
use crate::{FsepError, FsepRuntime, comm::Operation};

/// Gives all ranks rank 0's values of the replicated parameters. Collective.
///
/// Needed once, after initialisation, unless all ranks draw the same values anyway.
///
/// # Errors
///
/// [`FsepError::Comm`] if a collective fails.
pub fn broadcast_parameters<M: Module>(runtime: &FsepRuntime, model: M) -> Result<M, FsepError> {
    let mut values = Values { flat: Vec::new(), error: None };
    visit_params(&model, &mut values);
    if let Some(error) = values.error {
        runtime.comm().abort(&error.to_string());
        return Err(error);
    }
    let mut flat = values.flat;
    runtime.comm().broadcast(
        Operation::new("initial values of the replicated parameters"),
        bytemuck::cast_slice_mut(&mut flat),
        0,
    )?;
    if runtime.rank() == 0 {
        return Ok(model);
    }
    Ok(model.map(&mut Overwrite { path: PlacementPath::default(), rest: &flat }))
}

struct Values {
    flat: Vec<f64>,
    error: Option<FsepError>,
}

impl ParamVisitor for Values {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, placement: Placement) {
        if placement == Placement::Replicated {
            match param.val().try_into_data() {
                Ok(data) => self.flat.extend(data.iter::<f64>()),
                Err(error) => self.error = Some(FsepError::Device(error.to_string())),
            }
        }
    }
}

struct Overwrite<'a> {
    path: PlacementPath,
    rest: &'a [f64],
}

impl ModuleMapper for Overwrite<'_> {
    fn enter_module(&mut self, _name: &str, container: &str) {
        self.path.enter(container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.path.placement() == Placement::Sharded {
            return param;
        }
        let (values, rest) = self.rest.split_at(param.shape().num_elements());
        self.rest = rest;
        param.map(|tensor| {
            let data = TensorData::new(values.to_vec(), tensor.shape());
            let is_trained = tensor.is_require_grad();
            let value = Tensor::<D>::from_data(data, (&tensor.device(), tensor.dtype()));
            value.set_require_grad(is_trained)
        })
    }
}
