use burn::{
    module::{Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param},
    tensor::{Device, Tensor},
};

/// A module of one parameter, which stands at any path: an optimizer takes it for the one of the model there.
#[derive(Debug, Clone)]
pub(super) struct AtPath<const D: usize> {
    pub path: String,
    pub param: Param<Tensor<D>>,
}

const CONTAINER: &str = "burn-fsep:AtPath";

impl<const D: usize> Module for AtPath<D> {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        visitor.enter_module(&self.path, CONTAINER);
        Module::visit(&self.param, visitor);
        visitor.exit_module(&self.path, CONTAINER);
    }

    fn map<M: ModuleMapper>(mut self, mapper: &mut M) -> Self {
        mapper.enter_module(&self.path, CONTAINER);
        self.param = Module::map(self.param, mapper);
        mapper.exit_module(&self.path, CONTAINER);
        self
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        Module::collect_devices(&self.param, devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self { param: Module::fork(self.param, device), ..self }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { param: Module::to_device(self.param, device), ..self }
    }

    fn materialize(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn train(self) -> Self {
        self
    }
}

impl<const D: usize> ModuleDisplayDefault for AtPath<D> {
    fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
        content.optional()
    }
}

impl<const D: usize> ModuleDisplay for AtPath<D> {}
