use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::Tensor,
};

use crate::{burn_compat, moe::ExpertsInfo};

pub(super) use crate::moe::Placement;

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

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{FSEPMoEConfig, FsepRuntime};

    /// A user's own, which is none of ours.
    #[derive(Module, Debug)]
    struct FsepExperts {
        weight: Param<Tensor<1>>,
    }

    #[derive(Module, Debug)]
    struct Model {
        layer: crate::FSEPMoE,
        theirs: FsepExperts,
    }

    struct Placements(Vec<(String, Placement)>);

    impl ParamVisitor for Placements {
        fn visit<const D: usize>(&mut self, _: &Param<Tensor<D>>, path: &ModulePath) {
            self.0.push((path.path(), Placement::at(path)));
        }
    }

    #[test]
    fn a_type_of_the_same_name_has_no_shards() {
        let device = Device::flex();
        let layer = FSEPMoEConfig::new(4, 5, 4).init(&FsepRuntime::single(), &device);
        let model = Model { layer, theirs: FsepExperts { weight: Param::from_tensor(Tensor::ones([1], &device)) } };
        let mut placements = Placements(Vec::new());
        visit_params(&model, &mut placements);
        let expected = [
            ("layer.router.weight", Placement::Replicated),
            ("layer.experts.weight", Placement::Sharded),
            ("theirs.weight", Placement::Replicated),
        ];
        assert_eq!(placements.0, expected.map(|(path, placement)| (path.to_string(), placement)));
    }
}
