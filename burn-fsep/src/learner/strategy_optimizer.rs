use burn::{
    module::{ModuleVisitor, Param, ParamId},
    optim::{GradientsParams, LearningRate, Optimizer},
    tensor::{Device, Tensor, TensorData},
    train::{Learner, LearnerModel},
};

use crate::{FsepError, burn_compat::ModulePath, moe::ExpertsInfo};

/// The optimizer of a Learner where the strategy has the one that steps
/// ([`FsepStrategy::with_sharded_optimizer`](super::FsepStrategy::with_sharded_optimizer)): what it is given for gradients are the next
/// values of the parameters.
///
/// ```
/// # use burn::optim::ModuleOptimizer;
/// # use burn_fsep::learner::StrategyOptimizer;
/// let optimizer = ModuleOptimizer::from(StrategyOptimizer);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct StrategyOptimizer;

impl Optimizer for StrategyOptimizer {
    type State<const D: usize> = ();

    fn step<const D: usize>(
        &self,
        _lr: LearningRate,
        _tensor: Tensor<D>,
        value: Tensor<D>,
        _state: Option<()>,
    ) -> (Tensor<D>, Option<()>) {
        (value, None)
    }

    fn to_device<const D: usize>(_state: (), _device: &Device) {}
}

/// Gives a Learner with a [`StrategyOptimizer`] the parameters of `model`, where they are: a record, Burn's own way, would bring them
/// through host memory.
pub(super) fn set_parameters<M: LearnerModel>(learner: &mut Learner<M>, model: &M) {
    let mut values = Values { path: ModulePath::default(), values: GradientsParams::new() };
    model.visit(&mut values);
    learner.optimizer_step(values.values);
}

/// Checks on a copy that a Learner's optimizer is a [`StrategyOptimizer`].
///
/// # Errors
///
/// [`FsepError::Config`] if it is another one, which would take values for gradients; [`FsepError::Device`] if a parameter cannot be
/// read.
pub(super) fn check_optimizer<M: LearnerModel>(learner: &Learner<M>) -> Result<(), FsepError> {
    let model = learner.model();
    let mut smallest = Smallest(None);
    model.visit(&mut smallest);
    let Some((_, id)) = smallest.0 else { return Ok(()) };
    let mut next = Next { id, values: GradientsParams::new(), value: None };
    model.visit(&mut next);
    let mut copy = learner.clone();
    copy.optimizer_step(next.values);
    let mut found = Next { id, values: GradientsParams::new(), value: None };
    copy.model().visit(&mut found);
    let read = |value: Option<(TensorData, TensorData)>| {
        value.ok_or_else(|| FsepError::Device("a parameter cannot be read".into()))
    };
    let ((_, expected), (value, _)) = (read(next.value)?, read(found.value)?);
    if value == expected {
        return Ok(());
    }
    Err(FsepError::Config(
        "the strategy has the optimizer that steps (`with_sharded_optimizer`), so the Learner's has to be a `StrategyOptimizer`"
            .into(),
    ))
}

/// The values of a model's parameters.
struct Values {
    path: ModulePath<ExpertsInfo>,
    values: GradientsParams,
}

impl ModuleVisitor for Values {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // Clones of a model share running statistics. Of several places of a parameter an optimizer steps the first.
        if !self.path.is_running_statistic() && self.values.get::<D>(param.id).is_none() {
            self.values.register::<D>(param.id, param.val().inner());
        }
    }
}

/// The smallest parameter that is trained.
struct Smallest(Option<(usize, ParamId)>);

impl ModuleVisitor for Smallest {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let len = param.shape().num_elements();
        if len > 0 && param.val().is_require_grad() && self.0.is_none_or(|(smallest, _)| len < smallest) {
            self.0 = Some((len, param.id));
        }
    }
}

/// A parameter's value, and a next one.
struct Next {
    id: ParamId,
    values: GradientsParams,
    value: Option<(TensorData, TensorData)>,
}

impl ModuleVisitor for Next {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.id == self.id && self.value.is_none() {
            let (value, next) = (param.val().inner(), param.val().inner() + 1.0);
            self.values.register::<D>(self.id, next.clone());
            self.value = value.try_into_data().ok().zip(next.try_into_data().ok());
        }
    }
}
