use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::Tensor,
};

use crate::{burn_compat, moe::ExpertsInfo};

/// Where a parameter lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// Equal on all ranks.
    Replicated,
    /// A part that only this rank has.
    Sharded,
}

impl Placement {
    /// That of the parameter at a place of a model.
    pub fn at(path: &ModulePath) -> Self {
        if path.metadata().is_some() { Self::Sharded } else { Self::Replicated }
    }
}

/// Called for each float parameter of a model with where it stands.
pub(super) trait ParamVisitor {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath);
}

/// Visits the float parameters of a model in their declared order, which is the same on all ranks.
///
/// Parameter ids differ between processes, so ranks match parameters by this order.
pub(super) fn visit_params<M: Module>(model: &M, visitor: &mut impl ParamVisitor) {
    model.visit(&mut Walk { path: ModulePath::default(), visitor });
}

/// Where a visitor or mapper is in a model.
pub(super) type ModulePath = burn_compat::ModulePath<ExpertsInfo>;

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
