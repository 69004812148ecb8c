use burn::{
    module::{Module, ModuleMapper, Param},
    optim::GradientsParams,
    tensor::{DType, Tensor, TensorData},
};

use super::params::{ParamVisitor, Placement, PlacementPath, visit_params};
use crate::{
    FsepError, FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
};

/// Averages the gradients of all replicated parameters over ranks; expert shards are left alone, since their
/// gradients are complete after backward. Collective.
///
/// A parameter that got a gradient on some ranks only gets the average too, with zeros for the others; one that got
/// none anywhere (a frozen one) stays without. All ranks end with the same bits.
///
/// # Errors
///
/// [`FsepError::Comm`] if a collective fails.
pub fn sync_gradients<M: Module>(
    runtime: &FsepRuntime,
    model: &M,
    grads: &mut GradientsParams,
) -> Result<(), FsepError> {
    if runtime.world_size() == 1 {
        return Ok(());
    }
    let comm = runtime.comm();
    let mut presence = Presence { grads, present: Vec::new() };
    visit_params(model, &mut presence);
    let mut present = presence.present;
    comm.all_reduce(Operation::new("presence of gradients"), ReduceBuffer::F32(&mut present), ReduceOp::Max)?;

    let mut gather = Gather { grads, present: present.iter(), flat: Vec::new(), error: None };
    visit_params(model, &mut gather);
    let (mut flat, error) = (gather.flat, gather.error);
    if let Some(error) = error {
        comm.abort(&error.to_string());
        return Err(error);
    }
    comm.all_reduce(Operation::new("replicated gradients"), ReduceBuffer::F32(&mut flat), ReduceOp::Mean)?;
    visit_params(model, &mut Scatter { grads, present: present.iter(), rest: &flat });
    Ok(())
}

/// Which replicated parameters have a gradient on this rank.
struct Presence<'a> {
    grads: &'a GradientsParams,
    present: Vec<f32>,
}

impl ParamVisitor for Presence<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, placement: Placement) {
        if placement == Placement::Replicated {
            self.present.push(if self.grads.get::<D>(param.id).is_some() { 1.0 } else { 0.0 });
        }
    }
}

/// Flattens the gradients into one buffer.
struct Gather<'a> {
    grads: &'a GradientsParams,
    present: std::slice::Iter<'a, f32>,
    flat: Vec<f32>,
    error: Option<FsepError>,
}

impl ParamVisitor for Gather<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, placement: Placement) {
        if placement == Placement::Sharded || self.present.next() != Some(&1.0) {
            return;
        }
        match self.grads.get::<D>(param.id) {
            None => self.flat.resize(self.flat.len() + param.shape().num_elements(), 0.0),
            Some(grad) => match grad.cast(DType::F32).try_into_data() {
                Ok(data) => self.flat.extend(data.iter::<f32>()),
                Err(error) => self.error = Some(FsepError::Device(error.to_string())),
            },
        }
    }
}

/// Puts the averages back.
struct Scatter<'a> {
    grads: &'a mut GradientsParams,
    present: std::slice::Iter<'a, f32>,
    rest: &'a [f32],
}

impl ParamVisitor for Scatter<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, placement: Placement) {
        if placement == Placement::Sharded || self.present.next() != Some(&1.0) {
            return;
        }
        let (values, rest) = self.rest.split_at(param.shape().num_elements());
        self.rest = rest;
        let data = TensorData::new(values.to_vec(), param.shape());
        let grad = Tensor::<D>::from_data(data, &param.device().inner()).cast(param.dtype());
        self.grads.register::<D>(param.id, grad);
    }
}

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
