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
        backend::autodiff::{grads::Gradients, ops::Ops},
        tensor::{Device, Tensor},
    };
    use parking_lot::Mutex;

    use crate::burn_compat::{
        panics::catch_panic,
        test_op::{OnBackward, pass_back, test_op},
    };

    type Log = Arc<Mutex<Vec<&'static str>>>;

    /// Writes its name down in backward.
    #[derive(Debug, Clone)]
    struct Told(Log, &'static str);

    impl OnBackward for Told {
        fn on_backward(ops: Ops<Self, 1>, grads: &mut Gradients) {
            ops.state.0.lock().push(ops.state.1);
            pass_back(&ops, grads);
        }
    }

    fn told(tensor: Tensor<1>, log: &Log, name: &'static str) -> Tensor<1> {
        test_op(tensor, Told(log.clone(), name))
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

    /// Passes no gradient back.
    #[derive(Debug, Clone)]
    struct Mute;

    impl OnBackward for Mute {
        fn on_backward(_: Ops<Self, 1>, _: &mut Gradients) {}
    }

    #[test]
    fn a_parent_without_a_gradient_is_a_panic() {
        let x = Tensor::<1>::ones([1], &Device::flex().autodiff()).require_grad() * 2.0;
        let y = test_op(x, Mute);
        assert!(catch_panic(|| y.backward()).err().unwrap().contains("before they are registered"));
    }
}
