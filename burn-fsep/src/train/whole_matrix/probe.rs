//! Whether an optimizer can step experts part by part: tried with small ones, since Burn's optimizers do not say what they need.

use burn::{
    module::{Module, Param, ParamId},
    optim::{ModuleOptimizer, OptimizerRecord},
    tensor::{DType, Device, Tensor},
};

use super::{
    super::params::{ModulePath, ParamVisitor, visit_params},
    experts::Part,
};
use crate::{
    FsepError,
    burn_compat::{catch_panic, states_of},
};

/// Checks all experts of `model` that are trained; the optimizer's own state is not touched.
///
/// # Errors
///
/// [`FsepError::WholeMatrixOptimizer`] for the first experts that it cannot step, or whose state no checkpoint has a place for.
pub(super) fn check<M: Module>(optimizer: &ModuleOptimizer, model: &M) -> Result<(), FsepError> {
    let optimizer = optimizer.clone().load_record(OptimizerRecord::default());
    let mut check = Check { optimizer, error: None };
    visit_params(model, &mut check);
    check.error.map_or(Ok(()), Err)
}

struct Check {
    /// Without state.
    optimizer: ModuleOptimizer,
    error: Option<FsepError>,
}

impl ParamVisitor for Check {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        let Some(info) = path.metadata().filter(|_| self.error.is_none() && param.val().is_require_grad()) else {
            return;
        };
        let parameter = path.path();
        let experts = Experts { path: &parameter, id: param.id, device: param.device().inner() };
        let checked = catch_panic(|| experts.check(&self.optimizer, info.shape.bias));
        if let Err(reason) = checked.unwrap_or_else(|message| Err(format!("the optimizer panics: {message}"))) {
            self.error = Some(FsepError::WholeMatrixOptimizer { parameter, reason });
        }
    }
}

/// Of experts what optimizers see besides their values.
struct Experts<'a> {
    path: &'a str,
    id: ParamId,
    device: Device,
}

/// A parameter's values after a step, and the names of its state's fields.
type Stepped = (Vec<f32>, Vec<String>);

impl Experts<'_> {
    fn check(&self, optimizer: &ModuleOptimizer, has_biases: bool) -> Result<(), String> {
        let matrix = self.step(optimizer, ParamId::new(), &[2, 3])?;
        if self.step(optimizer, self.id, &[2, 3])?.0 != matrix.0 {
            return Err("a group of parameters has it by its id, but its matrices have ids of their own: make the group by path \
                        (`ParamGroup::from_path`)"
                .into());
        }
        let bias = has_biases.then(|| catch_panic(|| self.step(optimizer, ParamId::new(), &[3]))).transpose();
        match bias.map(Option::transpose) {
            Ok(Ok(bias)) if bias.as_ref().is_none_or(|bias| bias.1 == matrix.1) => Ok(()),
            Ok(Ok(_)) => Err("their biases get a state of other fields than their matrices".into()),
            Ok(Err(reason)) => Err(reason),
            Err(message) => {
                Err(format!("they have biases, which are vectors, and at one of these the optimizer panics: {message}"))
            }
        }
    }

    fn step(&self, optimizer: &ModuleOptimizer, id: ParamId, dims: &[usize]) -> Result<Stepped, String> {
        let mut optimizer = optimizer.clone();
        let values = Tensor::<1>::from_data([0.5, -1.25, 2.0, -0.3, 0.1, -0.2], (&self.device, DType::F32));
        let values = values.slice(0..dims.iter().product::<usize>());
        let part = Part { path: self.path, id, dims };
        let stepped = part.step(&mut optimizer, 0.1, values.clone(), values);
        let state = states_of(optimizer.to_record())?.remove(&id.val()).unwrap_or_default();
        for (field, tensor) in &state.tensors {
            if tensor.shape()[..] != *dims {
                return Err(format!(
                    "its `{field}` of a parameter {dims:?} has the shape {:?}, and checkpoints, which any number of ranks loads, have \
                     state of the parameter's shape only: use one whose state has it (Muon, LAMB, SGD, Adam, AdamW)",
                    tensor.shape().to_vec()
                ));
            }
        }
        let fields = state.tensors.into_keys().chain(state.scalars.into_keys()).collect();
        Ok((stepped.into_data().iter::<f32>().collect(), fields))
    }
}
