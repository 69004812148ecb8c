use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::Tensor,
};

/// Whether a parameter's value is made of others (LoRA), and not its own. Looks at no tensor.
///
/// Relied on: `Param` tells of a reparameterization only to who knows its type; but visitors of any meet it as a module in
/// a container of this name.
pub(crate) fn is_reparameterized<const D: usize>(param: &Param<Tensor<D>>) -> bool {
    struct Look(bool);

    impl ModuleVisitor for Look {
        fn enter_module(&mut self, _name: &str, container: &str) {
            self.0 |= container == "Reparameterization";
        }
    }

    let mut look = Look(false);
    param.visit(&mut look);
    look.0
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        module::{Lora, Reparameterization, Reparameterizer},
        nn::LinearConfig,
        tensor::Device,
    };

    use super::*;

    #[derive(Module, Debug)]
    struct Negative {
        scale: Param<Tensor<1>>,
    }

    impl Reparameterization for Negative {
        const NAME: &'static str = "negative";

        fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
            base.neg()
        }
    }

    struct Negate;

    impl Reparameterizer for Negate {
        type Reparam = Negative;

        fn reparameterize<const D: usize>(
            &mut self,
            _path: &str,
            param: Param<Tensor<D>>,
        ) -> (Param<Tensor<D>>, Option<Negative>) {
            let scale = Param::from_tensor(Tensor::ones([1], &param.lazy_device()));
            (param, Some(Negative { scale }))
        }
    }

    #[test]
    fn any_reparameterization_is_seen_until_it_is_merged() {
        let linear = LinearConfig::new(3, 2).init(&Device::flex().autodiff());
        assert!(!is_reparameterized(&linear.weight));
        let lora = linear.clone().apply_lora(Lora::new(1, 1.0));
        assert!(is_reparameterized(&lora.weight));
        assert!(!is_reparameterized(&lora.materialize().weight));
        assert!(is_reparameterized(&linear.apply_reparameterization(Negate).weight));
    }
}
