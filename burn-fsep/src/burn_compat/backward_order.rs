//! Relied on: backward runs operations by their depth in the graph, deepest first, where depth is one more than the deepest
//! parent's. So an operation on a parameter alone runs at the very end, and one that has an activation as another parent
//! runs after everything that depends on it and before anything that the activation was computed from.
//!
//! The gradient hook and the collection of experts' gradients are placed by this. And: an operation has to give each of its
//! tracked parents a gradient, since the parents' operations panic without one.

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::sync::Arc;

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
    use parking_lot::Mutex;

    use crate::burn_compat::panics::catch_panic;

    type Log = Arc<Mutex<Vec<&'static str>>>;

    /// Passes a tensor through and writes its name down in backward.
    #[derive(Debug)]
    struct Told;

    impl Backward<Flex, 1> for Told {
        type State = (Log, &'static str);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            ops.state.0.lock().push(ops.state.1);
            let gradient = grads.consume::<Flex>(&ops.node);
            if let [Some(parent)] = ops.parents {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }

    fn told(tensor: Tensor<1>, log: &Log, name: &'static str) -> Tensor<1> {
        let tensor = tensor.try_into_primitive::<Autodiff<Flex>>().unwrap();
        let output = match Told.prepare::<NoCheckpointing>([tensor.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((log.clone(), name), tensor.into_primitive()),
            OpsKind::UnTracked(prep) => prep.finish(tensor.into_primitive()),
        };
        Tensor::from_primitive::<Autodiff<Flex>>(output)
    }

    #[test]
    fn deepest_first_and_what_depends_on_a_parameter_alone_last() {
        let device = Device::flex().autodiff();
        let leaf = || Tensor::<1>::ones([1], &device).require_grad();
        let (x, first, second) = (leaf(), leaf(), leaf());
        let log = Log::default();
        let h = told(x * told(first, &log, "parameter of layer 1"), &log, "layer 1");
        // Made before the layer that it is used in, and nearer to the loss than anything else.
        let late = told(second.clone(), &log, "parameter of layer 2");
        let hooked = told(second + h.clone() * 0.0, &log, "second parameter of layer 2, with the layer's input");
        let y = told(h * late * hooked, &log, "layer 2");
        y.backward();
        let mut log = log.lock().clone();
        log[3..].sort_unstable();
        assert_eq!(
            log,
            [
                "layer 2",
                "second parameter of layer 2, with the layer's input",
                "layer 1",
                "parameter of layer 1",
                "parameter of layer 2"
            ]
        );
    }

    /// Passes a tensor through, but no gradient back.
    #[derive(Debug)]
    struct Mute;

    impl Backward<Flex, 1> for Mute {
        type State = ();

        fn backward(self, _: Ops<(), 1>, _: &mut Gradients, _: &mut Checkpointer) {}
    }

    #[test]
    fn a_parent_without_a_gradient_is_a_panic() {
        let x = Tensor::<1>::ones([1], &Device::flex().autodiff()).require_grad() * 2.0;
        let x = x.try_into_primitive::<Autodiff<Flex>>().unwrap();
        let OpsKind::Tracked(prep) = Mute.prepare::<NoCheckpointing>([x.node()]).compute_bound().stateful() else {
            panic!("it is tracked");
        };
        let y = Tensor::<1>::from_primitive::<Autodiff<Flex>>(prep.finish((), x.into_primitive()));
        assert!(catch_panic(|| y.backward()).err().unwrap().contains("before they are registered"));
    }
}
