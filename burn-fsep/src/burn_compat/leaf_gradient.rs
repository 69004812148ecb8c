//! Relied on: `Gradients::consume` takes the gradient of an operation's output away, but of a leaf it gives another handle, and
//! the gradient stays registered.
//!
//! The gradient hook looks at what backward has found so far of a parameter's gradient.

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        backend::{
            Autodiff, Flex,
            autodiff::{
                checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
                grads::Gradients,
                ops::{Backward, Ops, OpsKind},
            },
        },
        tensor::{Device, Tensor},
    };

    /// Looks at its parent's gradient twice while backward runs.
    #[derive(Debug)]
    struct Look;

    impl Backward<Flex, 1> for Look {
        type State = ();

        fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let gradient = grads.consume::<Flex>(&ops.node);
            let [parent] = ops.parents;
            let parent = parent.unwrap();
            grads.register::<Flex>(parent.id, gradient);
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
        let tensor = leaf.clone().try_into_primitive::<Autodiff<Flex>>().unwrap();
        let OpsKind::Tracked(prep) = Look.prepare::<NoCheckpointing>([tensor.node()]).compute_bound().stateful() else {
            panic!("a leaf is tracked");
        };
        let output = Tensor::<1>::from_primitive::<Autodiff<Flex>>(prep.finish((), tensor.into_primitive()));
        let grads = (output * 3.0).backward();
        assert_eq!(leaf.grad(&grads).unwrap().into_scalar::<f32>(), 3.0);
    }
}
