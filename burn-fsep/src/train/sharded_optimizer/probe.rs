//! Whether an optimizer steps a parameter element by element.
//!
//! Burn's optimizers do not say so, and which one steps a parameter is known to the optimizer alone. So it is tried: two steps of six
//! elements under the parameter's id and path, once whole and once in halves. Magnitudes of the halves are far apart, and change places
//! between the steps, so that whatever is computed from more than one element (a norm, a mean, a product of matrices) differs.

use std::collections::HashSet;

use burn::{
    module::{Module, Param, ParamId},
    optim::{GradientsParams, ModuleOptimizer, OptimizerRecord},
    tensor::{DType, Device, Tensor, TensorData},
};

use super::super::{
    at_path::AtPath,
    params::{ModulePath, ParamVisitor, visit_params},
};
use crate::{
    FsepError,
    burn_compat::{ParamState, catch_panic, states_of},
};

const VALUES: [f32; 6] = [0.5, -1.25, 2.0, -0.3, 0.1, -0.2];
/// Large enough for any maximum norm to bite.
const GRADIENTS: [[f32; 6]; 2] = [[3e8, -1e8, 2e8, 1e5, 3e5, -2e5], [-1e5, -2e5, 3e5, 2e8, 1e8, 3e8]];
const LEARNING_RATE: f64 = 0.1;
/// Relative: what backends may round otherwise where an element stands elsewhere.
const TOLERANCE: f32 = 1e-4;

/// Checks the parameters of `model` with these ids; the optimizer's own state is not touched.
///
/// # Errors
///
/// [`FsepError::ShardedOptimizer`] for the first that is not stepped element by element, or whose state has other shapes.
pub(super) fn check<M: Module>(
    optimizer: &ModuleOptimizer,
    model: &M,
    parameters: &HashSet<ParamId>,
) -> Result<(), FsepError> {
    let optimizer = optimizer.clone().load_record(OptimizerRecord::default());
    let mut probe = Check { optimizer, missing: parameters.clone(), error: None };
    visit_params(model, &mut probe);
    probe.error.map_or(Ok(()), Err)
}

struct Check {
    /// Without state.
    optimizer: ModuleOptimizer,
    missing: HashSet<ParamId>,
    error: Option<FsepError>,
}

impl ParamVisitor for Check {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        // What has no dimensions is never cut.
        if D == 0 || self.error.is_some() || !self.missing.remove(&param.id) {
            return;
        }
        let place = Place { id: param.id, path: path.path(), device: param.device() };
        let probed = catch_panic(|| place.check::<D>(&self.optimizer));
        if let Err(reason) = probed.unwrap_or_else(|message| Err(format!("the optimizer panics: {message}"))) {
            self.error = Some(FsepError::ShardedOptimizer { parameter: place.path, reason });
        }
    }
}

/// Of a parameter what optimizers see besides its value.
struct Place {
    id: ParamId,
    path: String,
    device: Device,
}

impl Place {
    fn check<const D: usize>(&self, optimizer: &ModuleOptimizer) -> Result<(), String> {
        let mut dims = [1; D];
        dims[D - 1] = 6;
        if D > 1 {
            (dims[D - 2], dims[D - 1]) = (2, 3);
        }
        let mut half = [1; D];
        half[D - 1] = 3;
        let (whole, state) = self.steps(optimizer, dims, 0)?;
        for (field, tensor) in state.tensors {
            if tensor.shape()[..] != dims {
                return Err(format!("its `{field}` of a parameter {dims:?} has the shape {:?}", tensor.shape()));
            }
        }
        let mut halves = self.steps(optimizer, half, 0)?.0;
        halves.extend(self.steps(optimizer, half, 3)?.0);
        let differ = |(a, b): (&f32, &f32)| {
            (a - b).abs() > TOLERANCE * a.abs().max(b.abs()).max(1.0) || a.is_nan() != b.is_nan()
        };
        match whole.iter().zip(&halves).position(differ) {
            None => Ok(()),
            Some(_) => Err(format!(
                "the optimizer does not treat every element by itself: a parameter {VALUES:?} became {whole:?} as a whole and {halves:?} \
                 in halves. SGD, Adam, AdamW and the like do, Muon, LAMB, Adafactor and clipping by norm do not; `max_grad_norm` \
                 clips by the norm of all gradients"
            )),
        }
    }

    /// Two steps of the elements from `start` on: what they became, and the state.
    fn steps<const D: usize>(
        &self,
        optimizer: &ModuleOptimizer,
        dims: [usize; D],
        start: usize,
    ) -> Result<(Vec<f32>, ParamState), String> {
        let device = self.device.clone().inner();
        let tensor = |values: &[f32]| {
            let values = values[start..start + dims.iter().product::<usize>()].to_vec();
            Tensor::<D>::from_data(TensorData::new(values, dims), (&device, DType::F32))
        };
        let mut optimizer = optimizer.clone();
        let param = Param::initialized(self.id, Tensor::from_inner(tensor(&VALUES)));
        let mut probe = AtPath { path: self.path.clone(), param };
        for gradient in &GRADIENTS {
            let mut grads = GradientsParams::new();
            grads.register(self.id, tensor(gradient));
            probe = optimizer.step(LEARNING_RATE, probe, grads);
        }
        let values = probe.param.val().into_data().iter::<f32>().collect();
        let state = states_of(optimizer.to_record())?.remove(&self.id.val()).unwrap_or_default();
        Ok((values, state))
    }
}
