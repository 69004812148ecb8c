use std::collections::HashMap;

use burn::{
    lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    module::{ModuleMapper, Param, ParamId},
    optim::{GradientsParams, ModuleOptimizer},
    tensor::{DType, Tensor},
};

use super::super::{
    at_path::AtPath,
    params::{ModulePath, ParamVisitor},
};
use crate::{
    FsepRuntime,
    burn_compat::ParameterContext,
    comm::{ExchangePlan, Operation},
    moe::ExpertsInfo,
    ops::{WeightStorage, all_to_all},
    shard::{ExpertPart, WholeExperts, part_id},
};

const VALUES: Operation = Operation::new("experts to step");
const GRADIENTS: Operation = Operation::new("gradients of experts to step");
const STEPPED: Operation = Operation::new("stepped experts");

/// Takes the gradients of this rank's parts of experts out of those of the model.
pub(super) struct TakeGradients<'a> {
    pub grads: &'a mut GradientsParams,
    /// As one row of elements each.
    pub taken: HashMap<ParamId, Tensor<1>>,
    /// Layer and types of value and gradient, in the model's order.
    pub facts: Vec<(usize, DType, DType)>,
}

impl ParamVisitor for TakeGradients<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        let Some(info) = path.metadata() else { return };
        let Some(gradient) = self.grads.remove::<D>(param.id) else { return };
        self.facts.push((info.layer, param.dtype(), gradient.dtype()));
        let len = gradient.shape().num_elements();
        self.taken.insert(param.id, gradient.inner().reshape([len]));
    }
}

/// Steps the experts of all layers that have a gradient, each whole on one of the ranks that share it. Collective.
pub(super) struct StepExperts<'a> {
    pub runtime: &'a FsepRuntime,
    pub optimizer: &'a mut ModuleOptimizer,
    pub lr: &'a ModuleLearningRate,
    pub gradients: HashMap<ParamId, Tensor<1>>,
    pub path: ModulePath,
}

impl ModuleMapper for StepExperts<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = param.id;
        let (Some(&info), Some(gradient)) = (self.path.metadata(), self.gradients.remove(&id)) else { return param };
        param.map(|tensor| {
            let (context, shape) = (ParameterContext::capture(&tensor), tensor.shape());
            let values = tensor.inner().reshape([shape.num_elements()]);
            context.restore(self.step_layer(&info, id, values, gradient).reshape(shape))
        })
    }
}

impl StepExperts<'_> {
    /// The next values of this rank's part of a layer's experts, `[E * S]`, or `[E / N * P]` of whole ones.
    fn step_layer(&mut self, info: &ExpertsInfo, id: ParamId, values: Tensor<1>, gradients: Tensor<1>) -> Tensor<1> {
        let comm = self.runtime.groups().experts();
        let (rank, ranks) = (comm.rank(), comm.size());
        let whole = WholeExperts { experts: info.num_experts, ranks };
        let are_cut = info.storage == WeightStorage::Sharded && ranks > 1;
        let plan = are_cut.then(|| whole.gather(rank, info.shape.shard_len(ranks)));
        let exchange = |tensor, plan: Option<&ExchangePlan>, operation| match plan {
            Some(plan) => all_to_all(tensor, plan.clone(), comm, operation),
            None => tensor,
        };
        let values = exchange(values, plan.as_ref(), VALUES);
        let gradients = exchange(gradients, plan.as_ref(), GRADIENTS);
        let stepped = match whole.of_rank(rank) {
            none if none.is_empty() => values,
            experts => {
                let row_len = values.dims()[0] / experts.len();
                let (path, parts) = (self.path.path(), info.shape.parts());
                let lr = self.lr.lr_from_param(id, Some(&path));
                let mut stepped = Vec::with_capacity(experts.len() * (parts.len() + 1));
                for (row, expert) in experts.enumerate() {
                    let start = row * row_len;
                    for (place, ExpertPart { range, dims }) in parts.iter().enumerate() {
                        let of = |tensor: &Tensor<1>| tensor.clone().slice(start + range.start..start + range.end);
                        let part = Part { path: &path, id: part_id(id, expert, place), dims };
                        stepped.push(part.step(self.optimizer, lr, of(&values), of(&gradients)));
                    }
                    let padding = start + info.shape.num_params()..start + row_len;
                    if !padding.is_empty() {
                        stepped.push(values.clone().slice(padding));
                    }
                }
                Tensor::cat(stepped, 0)
            }
        };
        exchange(stepped, plan.map(|plan| plan.reversed()).as_ref(), STEPPED)
    }
}

/// A matrix or a bias of an expert as an optimizer sees it.
pub(super) struct Part<'a> {
    /// Where the experts stand in the model.
    pub path: &'a str,
    pub id: ParamId,
    pub dims: &'a [usize],
}

impl Part<'_> {
    /// The next values, flat as the values and the gradient.
    pub fn step(&self, optimizer: &mut ModuleOptimizer, lr: f64, values: Tensor<1>, gradient: Tensor<1>) -> Tensor<1> {
        match *self.dims {
            [rows, columns] => self.step_as(optimizer, lr, values, gradient, [rows, columns]),
            _ => {
                let dims = values.dims();
                self.step_as(optimizer, lr, values, gradient, dims)
            }
        }
    }

    fn step_as<const D: usize>(
        &self,
        optimizer: &mut ModuleOptimizer,
        lr: f64,
        values: Tensor<1>,
        gradient: Tensor<1>,
        dims: [usize; D],
    ) -> Tensor<1> {
        let len = values.dims();
        let mut grads = GradientsParams::new();
        grads.register::<D>(self.id, gradient.reshape(dims));
        // Burn's optimizers panic at a parameter without autodiff.
        let param = Param::initialized(self.id, Tensor::<D>::from_inner(values.reshape(dims)));
        let stepped = optimizer.step(lr, AtPath { path: self.path.into(), param }, grads);
        stepped.param.val().inner().reshape(len)
    }
}
