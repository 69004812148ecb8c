//! Relied on: `Gradients::consume` takes the gradient of an operation's output away, but of a leaf it gives another handle, and
//! the gradient stays registered.
//!
//! The gradient hook looks at what backward has found so far of a parameter's gradient.

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        backend::{
            Flex,
            autodiff::{grads::Gradients, ops::Ops},
        },
        tensor::{Device, Tensor},
    };

    use crate::burn_compat::test_op::{OnBackward, pass_back, test_op};

    /// Looks at its parent's gradient twice while backward runs.
    #[derive(Debug, Clone)]
    struct Look;

    impl OnBackward for Look {
        fn on_backward(ops: Ops<Self, 1>, grads: &mut Gradients) {
            pass_back(&ops, grads);
            let [parent] = ops.parents;
            let parent = parent.unwrap();
            for _ in 0..2 {
                let found = Tensor::<1>::from_primitive::<Flex>(grads.consume::<Flex>(&parent));
                assert_eq!(found.into_scalar::<f32>(), 3.0);
            }
        }
    }

    #[test]
    fn a_leafs_gradient_stays_when_it_is_looked_at() {
        let device = Device::flex().autodiff();
        let leaf = Tensor::<1>::ones([1], &device).require_grad();
        let grads = (test_op(leaf.clone(), Look) * 3.0).backward();
        assert_eq!(leaf.grad(&grads).unwrap().into_scalar::<f32>(), 3.0);
    }
}
