use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::Tensor,
};

use crate::moe::FsepExperts;

/// Where a parameter lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// Equal on all ranks.
    Replicated,
    /// A part that only this rank has.
    Sharded,
}

/// Called for each float parameter of a model with where it stands.
pub(super) trait ParamVisitor {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath);
}

/// The container of Burn's one module with running statistics.
pub(super) const BATCH_NORM: &str = "Struct:BatchNorm";

/// Visits the float parameters of a model in their declared order, which is the same on all ranks.
///
/// Parameter ids differ between processes, so ranks match parameters by this order.
pub(super) fn visit_params<M: Module>(model: &M, visitor: &mut impl ParamVisitor) {
    model.visit(&mut Walk { path: ModulePath::default(), visitor });
}

/// Follows the fields that a visitor or mapper enters, and tells what it meets there.
#[derive(Default)]
pub(super) struct ModulePath(Vec<Field>);

struct Field {
    name: String,
    placement: Placement,
    is_statistic: bool,
}

impl ModulePath {
    pub fn enter(&mut self, name: &str, container: &str) {
        let is_shard = container == FsepExperts::CONTAINER;
        let placement = if is_shard { Placement::Sharded } else { self.placement() };
        let is_statistic = container == BATCH_NORM && name.starts_with("running_");
        self.0.push(Field { name: name.to_string(), placement, is_statistic });
    }

    pub fn exit(&mut self) {
        self.0.pop();
    }

    pub fn placement(&self) -> Placement {
        self.0.last().map_or(Placement::Replicated, |field| field.placement)
    }

    /// Whether it is no parameter, though visitors see it as one: a statistic of the rank's own batches.
    pub fn is_statistic(&self) -> bool {
        self.0.last().is_some_and(|field| field.is_statistic)
    }

    /// The names of the fields, with dots between them.
    pub fn name(&self) -> String {
        self.0.iter().map(|field| field.name.as_str()).collect::<Vec<_>>().join(".")
    }
}

struct Walk<'a, V> {
    path: ModulePath,
    visitor: &'a mut V,
}

impl<V: ParamVisitor> ModuleVisitor for Walk<'_, V> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.visitor.visit(param, &self.path);
    }
}
