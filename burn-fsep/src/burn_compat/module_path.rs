use super::{
    metadata::{Metadata, Value},
    running_statistics::is_running_statistic,
};

/// Where a visitor or mapper is in a module, and the [`Metadata`] of what it is in.
///
/// Relied on: `enter_module` and `exit_module` enclose each field, with its name, and with `Struct:` or `Enum:` and the type
/// in which the field stands as its container; visitors and mappers meet the same fields in the same order, and Burn's
/// records name parameters by these names, joined by dots.
#[derive(Debug)]
pub(crate) struct ModulePath<T> {
    fields: Vec<Field>,
    /// What was met so far in the modules that the place is in: their depth, and the metadata.
    metadata: Vec<(usize, T)>,
}

#[derive(Debug)]
struct Field {
    name: String,
    /// What it stands in.
    container: String,
    is_variant: bool,
    is_running_statistic: bool,
}

impl<T> Default for ModulePath<T> {
    fn default() -> Self {
        Self { fields: Vec::new(), metadata: Vec::new() }
    }
}

impl<T: Value> ModulePath<T> {
    pub fn enter(&mut self, name: &str, container: &str) {
        if let Some(metadata) = Metadata::read(name, container) {
            // It is met inside of the module's field for it.
            self.metadata.push((self.fields.len().saturating_sub(1), metadata));
        }
        self.fields.push(Field {
            name: name.into(),
            container: container.into(),
            is_variant: container.starts_with("Enum:"),
            is_running_statistic: is_running_statistic(name, container),
        });
    }

    pub fn exit(&mut self) {
        self.fields.pop();
        self.metadata.retain(|(depth, _)| *depth <= self.fields.len());
    }

    /// The names of the fields, as Burn's records have them.
    pub fn path(&self) -> String {
        join(self.fields.iter())
    }

    /// The same without variants of enums.
    pub fn path_without_variants(&self) -> String {
        join(self.fields.iter().filter(|field| !field.is_variant))
    }

    /// The same as names, each with the container in which the field stands.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        let fields = self.fields.iter().filter(|field| !field.is_variant);
        fields.map(|field| (field.name.as_str(), field.container.as_str()))
    }

    /// Whether it is no parameter, though visitors and mappers meet it as one: a statistic of the rank's own batches.
    pub fn is_running_statistic(&self) -> bool {
        self.fields.last().is_some_and(|field| field.is_running_statistic)
    }

    /// The metadata of the innermost module around the place that has some.
    pub fn metadata(&self) -> Option<&T> {
        self.metadata.last().map(|(_, metadata)| metadata)
    }
}

fn join<'a>(fields: impl Iterator<Item = &'a Field>) -> String {
    fields.map(|field| field.name.as_str()).collect::<Vec<_>>().join(".")
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        module::{Module, ModuleMapper, ModuleVisitor, Param},
        tensor::{Device, Tensor},
    };
    use burn_pack::Reader;

    use super::*;

    #[derive(Module, Debug)]
    struct Leaf {
        info: Metadata<u32>,
        weight: Param<Tensor<1>>,
    }

    #[derive(Module, Debug)]
    #[allow(clippy::large_enum_variant)]
    enum Choice {
        A(Leaf),
        #[allow(dead_code)]
        B(Leaf),
    }

    #[derive(Module, Debug)]
    struct Root {
        list: Vec<Leaf>,
        maybe: Option<Leaf>,
        choice: Choice,
        own: Param<Tensor<1>>,
    }

    /// Path, path without variants and metadata of each parameter.
    #[derive(Default)]
    struct Walk(ModulePath<u32>, Vec<(String, String, Option<u32>)>);

    impl Walk {
        fn meet(&mut self) {
            self.1.push((self.0.path(), self.0.path_without_variants(), self.0.metadata().copied()));
        }
    }

    impl ModuleVisitor for Walk {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.exit();
        }

        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
            self.meet();
        }
    }

    impl ModuleMapper for Walk {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.exit();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            self.meet();
            param
        }
    }

    #[test]
    fn visitors_mappers_and_records_go_by_the_same_names() {
        let param = || Param::from_tensor(Tensor::ones([1], &Device::flex()));
        let leaf = |number| Leaf { info: Metadata(number), weight: param() };
        let root =
            Root { list: vec![leaf(0), leaf(1)], maybe: Some(leaf(2)), choice: Choice::A(leaf(3)), own: param() };
        let (mut visited, mut mapped) = (Walk::default(), Walk::default());
        root.visit(&mut visited);
        let root = root.map(&mut mapped);
        let expected = [
            ("list.0.weight", "list.0.weight", Some(0)),
            ("list.1.weight", "list.1.weight", Some(1)),
            ("maybe.weight", "maybe.weight", Some(2)),
            ("choice.A.weight", "choice.weight", Some(3)),
            ("own", "own", None),
        ];
        assert_eq!(visited.1, expected.map(|(path, name, info)| (path.into(), name.into(), info)));
        assert_eq!(visited.1, mapped.1);
        let record = Reader::from_bytes(root.into_record().into_bytes().unwrap()).unwrap();
        let mut paths: Vec<_> = visited.1.iter().map(|(path, ..)| path.as_str()).collect();
        paths.sort_unstable();
        let mut names = record.tensor_names();
        names.sort_unstable();
        assert_eq!(names, paths);
    }
}
