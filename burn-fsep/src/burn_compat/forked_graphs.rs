//! Relied on: `fork` gives a module leaves of an autodiff graph of its own, and graphs of different threads run backward at the
//! same time. Clones share a graph, whose lock a thread holds during all of its backward, so ranks that are threads would
//! wait for each other while one waits for the other's part of a collective.

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::{
        sync::mpsc::{Receiver, Sender, channel},
        thread,
        time::Duration,
    };

    use burn::{
        backend::{
            Autodiff, Flex,
            autodiff::{
                checkpoint::{base::Checkpointer, strategy::NoCheckpointing},
                grads::Gradients,
                ops::{Backward, Ops, OpsKind},
            },
        },
        module::{Module, Param},
        tensor::{Device, Tensor},
    };
    use parking_lot::Mutex;

    /// Meets the other thread in the midst of backward.
    #[derive(Debug)]
    struct Meet;

    #[derive(Clone, Debug)]
    struct Ends(Sender<()>, std::sync::Arc<Mutex<Receiver<()>>>);

    impl Backward<Flex, 1> for Meet {
        type State = Ends;

        fn backward(self, ops: Ops<Ends, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            ops.state.0.send(()).unwrap();
            ops.state
                .1
                .lock()
                .recv_timeout(Duration::from_secs(60))
                .expect("the other thread waits for this one's graph");
            let gradient = grads.consume::<Flex>(&ops.node);
            if let [Some(parent)] = ops.parents {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }

    #[derive(Module, Debug)]
    struct Leaf {
        weight: Param<Tensor<1>>,
    }

    #[test]
    fn threads_with_forks_of_a_module_run_backward_at_the_same_time() {
        let device = Device::flex().autodiff();
        let leaf = Leaf { weight: Param::from_tensor(Tensor::ones([1], &device)) };
        // A graph that a clone would share.
        let _shared = leaf.weight.val() * 2.0;
        let ((to_b, at_b), (to_a, at_a)) = (channel(), channel());
        let run = |leaf: Leaf, sender, receiver: Receiver<()>| {
            let device = Device::flex().autodiff();
            let leaf = leaf.fork(&device);
            let weight = (leaf.weight.val() * 1.0).try_into_primitive::<Autodiff<Flex>>().unwrap();
            let ends = Ends(sender, std::sync::Arc::new(Mutex::new(receiver)));
            let OpsKind::Tracked(prep) = Meet.prepare::<NoCheckpointing>([weight.node()]).compute_bound().stateful()
            else {
                panic!("a parameter is tracked");
            };
            let output = Tensor::<1>::from_primitive::<Autodiff<Flex>>(prep.finish(ends, weight.into_primitive()));
            let grads = output.backward();
            assert!(leaf.weight.val().grad(&grads).is_some());
        };
        thread::scope(|scope| {
            let other = leaf.clone();
            scope.spawn(move || run(other, to_b, at_a));
            run(leaf, to_a, at_b);
        });
    }
}
