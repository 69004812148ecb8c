use std::fmt::{Debug, Display};

use burn::{
    module::{Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor},
    tensor::Device,
};
use serde::{Serialize, de::DeserializeOwned};

/// What visitors of a module are to know of it, as a field before its parameters.
///
/// Relied on: visitors and mappers see nothing of a module but names, containers and parameters, in the declared order of
/// fields. So this is a module without parameters whose name, as they meet it, is its content as JSON. Its container is none
/// that Burn's `derive(Module)` can give a module of somebody else's. Records have parameters only and do not show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Metadata<T>(pub T);

/// Values of metadata. How they are displayed is what a model shows of them when it is printed.
pub(crate) trait Value: Serialize + DeserializeOwned + Clone + Debug + Display + Send {}

impl<T: Serialize + DeserializeOwned + Clone + Debug + Display + Send> Value for T {}

impl<T: Value> Metadata<T> {
    pub const CONTAINER: &'static str = "burn-fsep:Metadata";

    /// The metadata that a visitor or mapper meets under this name, if it is some.
    pub fn read(name: &str, container: &str) -> Option<T> {
        (container == Self::CONTAINER).then(|| serde_json::from_str(name).ok()).flatten()
    }

    fn name(&self) -> String {
        serde_json::to_string(&self.0).expect("metadata has a JSON form")
    }
}

impl<T: Value> Module for Metadata<T> {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let name = self.name();
        visitor.enter_module(&name, Self::CONTAINER);
        visitor.exit_module(&name, Self::CONTAINER);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let name = self.name();
        mapper.enter_module(&name, Self::CONTAINER);
        mapper.exit_module(&name, Self::CONTAINER);
        self
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn fork(self, _: &Device) -> Self {
        self
    }

    fn to_device(self, _: &Device) -> Self {
        self
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

impl<T: Value> ModuleDisplayDefault for Metadata<T> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&self.0).optional()
    }
}

impl<T: Value> ModuleDisplay for Metadata<T> {}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{module::Param, tensor::Tensor};
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
    struct Info {
        rows: usize,
        scale: f32,
    }

    impl Display for Info {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "{} rows", self.rows)
        }
    }

    #[derive(Module, Debug)]
    struct Holder {
        info: Metadata<Info>,
        weight: Param<Tensor<1>>,
    }

    #[derive(Default)]
    struct Seen(Vec<String>, Vec<Info>);

    impl Seen {
        fn enter(&mut self, name: &str, container: &str) {
            self.1.extend(Metadata::<Info>::read(name, container));
        }
    }

    impl ModuleVisitor for Seen {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.enter(name, container);
        }

        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
            self.0.push(format!("{} seen before", self.1.len()));
        }
    }

    impl ModuleMapper for Seen {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.enter(name, container);
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            self.0.push(format!("{} seen before", self.1.len()));
            param
        }
    }

    #[test]
    fn visitors_and_mappers_meet_it_before_the_parameters_and_records_do_not() {
        let info = Info { rows: 3, scale: 0.1 };
        let holder =
            Holder { info: Metadata(info), weight: Param::from_tensor(Tensor::ones([1], &Device::flex().autodiff())) };
        let mut seen = Seen::default();
        holder.visit(&mut seen);
        let holder = holder.map(&mut seen);
        assert_eq!((seen.0, seen.1), (vec!["1 seen before".into(), "2 seen before".into()], vec![info; 2]));
        // Whatever else happens to a module, it stays.
        let holder = Module::valid(&holder.fork(&Device::flex().autodiff())).train();
        assert_eq!(holder.info, Metadata(info));
        assert!(holder.to_string().contains("3 rows"), "{holder}");
        assert_eq!(Module::num_params(&holder), 1);
        assert_eq!(holder.clone().into_record().len(), 1);
        assert_eq!(holder.clone().load_record(holder.into_record()).info, Metadata(info));
    }
}
