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

/// Called for each float parameter of a model with its placement.
pub(super) trait ParamVisitor {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, placement: Placement);
}

/// Visits the float parameters of a model in their declared order, which is the same on all ranks.
///
/// Parameter ids differ between processes, so ranks match parameters by this order.
pub(super) fn visit_params<M: Module>(model: &M, visitor: &mut impl ParamVisitor) {
    model.visit(&mut Walk { path: PlacementPath::default(), visitor });
}

/// Follows the fields that a visitor or mapper enters, and tells the placement of what it meets there.
#[derive(Default)]
pub(super) struct PlacementPath(Vec<Placement>);

impl PlacementPath {
    pub fn enter(&mut self, container: &str) {
        let is_shard = container == FsepExperts::CONTAINER;
        self.0.push(if is_shard { Placement::Sharded } else { self.placement() });
    }

    pub fn exit(&mut self) {
        self.0.pop();
    }

    pub fn placement(&self) -> Placement {
        self.0.last().copied().unwrap_or(Placement::Replicated)
    }
}

struct Walk<'a, V> {
    path: PlacementPath,
    visitor: &'a mut V,
}

impl<V: ParamVisitor> ModuleVisitor for Walk<'_, V> {
    fn enter_module(&mut self, _name: &str, container: &str) {
        self.path.enter(container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.visitor.visit(param, self.path.placement());
    }
}
