/// Whether fields of a module in this container may be running statistics: buffers that visitors and mappers meet as
/// parameters without a gradient.
///
/// Relied on: Burn's one module with them is `BatchNorm`. Clones share them, so a mapper of a clone changes them everywhere;
/// a `fork` does, too.
pub(crate) fn has_running_statistics(container: &str) -> bool {
    container == "Struct:BatchNorm"
}

/// Whether a field in this container is one of them.
pub(super) fn is_running_statistic(field: &str, container: &str) -> bool {
    has_running_statistics(container) && field.starts_with("running_")
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        module::{Module, ModuleMapper, ModuleVisitor, Param},
        nn::BatchNormConfig,
        tensor::{Device, Tensor},
    };

    use super::*;

    #[derive(Default)]
    struct Seen(Vec<(String, bool)>, Vec<String>);

    impl ModuleVisitor for Seen {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.push((name.into(), false));
            self.1.extend(is_running_statistic(name, container).then(|| name.into()));
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.last_mut().unwrap().1 = param.val().is_require_grad();
        }
    }

    struct Sevens;

    impl ModuleMapper for Sevens {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|tensor| tensor.full_like(7.0))
        }
    }

    #[test]
    fn they_are_met_as_parameters_without_gradients_and_shared_by_clones() {
        let norm = BatchNormConfig::new(1).init(&Device::flex().autodiff());
        let mut seen = Seen::default();
        norm.visit(&mut seen);
        assert_eq!(seen.1, ["running_mean", "running_var"]);
        for (name, is_trained) in [("gamma", true), ("beta", true), ("running_mean", false), ("running_var", false)] {
            assert!(seen.0.contains(&(name.to_string(), is_trained)), "{name} in {:?}", seen.0);
        }
        let clone = norm.clone().map(&mut Sevens);
        assert_eq!(norm.running_mean.value().into_scalar::<f32>(), 7.0, "clones do not share any more");
        assert_eq!(norm.gamma.val().into_scalar::<f32>(), 1.0);
        assert_eq!(clone.gamma.val().into_scalar::<f32>(), 7.0);
    }
}
