use burn::tensor::{GradientCheckpointingStrategy, Tensor};

/// What a parameter's tensor carries besides its value, taken before it is replaced and put on the new one.
///
/// Relied on: of a tensor's autodiff state Burn's optimizers keep this (and what only Burn's own distributed training sets), and
/// make every parameter that they step a leaf of its own. Theirs is private.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParameterContext {
    require_grad: bool,
    checkpointing: Option<GradientCheckpointingStrategy>,
}

impl ParameterContext {
    pub fn capture<const D: usize>(parameter: &Tensor<D>) -> Self {
        Self { require_grad: parameter.is_require_grad(), checkpointing: parameter.gradient_checkpointing_strategy() }
    }

    /// `value`, without gradients, as the parameter's.
    pub fn restore<const D: usize>(&self, value: Tensor<D>) -> Tensor<D> {
        let mut parameter = Tensor::from_inner(value);
        if let Some(strategy) = self.checkpointing {
            parameter = parameter.with_gradient_checkpointing_strategy(strategy);
        }
        if self.require_grad { parameter.require_grad() } else { parameter }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        nn::{Linear, LinearConfig},
        optim::{GradientsParams, SgdConfig},
        tensor::Device,
    };

    use super::*;

    #[test]
    fn a_restored_parameter_is_what_an_optimizer_leaves() {
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            for trained in [true, false] {
                let mut linear: Linear = LinearConfig::new(2, 3).with_bias(false).init(&device);
                linear.weight = linear.weight.set_require_grad(trained);
                let mut grads = GradientsParams::new();
                grads.register(linear.weight.id, Tensor::<2>::ones([2, 3], &device.clone().inner()));
                let context = ParameterContext::capture(&linear.weight.val());
                let stepped = SgdConfig::new().init().step(0.1, linear, grads).weight.val();
                assert_eq!(ParameterContext::capture(&stepped), context, "Burn's optimizer keeps it");
                let restored = context.restore(stepped.clone().inner());
                assert_eq!(ParameterContext::capture(&restored), context);
                assert_eq!((restored.is_autodiff(), restored.device()), (stepped.is_autodiff(), stepped.device()));
            }
        }
    }
}
