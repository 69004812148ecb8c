//! An ordinary typed error prints nothing. Alone in its program, since a program has one panic hook.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use burn::tensor::Tensor;
use burn_fsep::{FSEPMoEConfig, FsepError, FsepRuntime, comm::local::LaunchConfig, moe::RouterOutput};
use burn_fsep_tests::{Fault, FaultMode, FaultyCommunicator, device, launch};

#[test]
fn errors_print_nothing_where_they_are_caught_and_their_message_elsewhere() {
    let printed = Arc::new(AtomicUsize::new(0));
    let before = take_hook();
    let count = printed.clone();
    set_hook(Box::new(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    }));
    let config = FSEPMoEConfig::new(4, 6, 4);
    let single = || FsepRuntime::single();
    let wrong = || Tensor::<2>::ones([3, 5], &device());

    let mut errors = vec![config.init(&single(), &device()).try_forward(wrong()).unwrap_err()];
    let nobody = RouterOutput::new(Tensor::ones([3, 2], &device()), Tensor::full([3, 2], 4, &device()));
    let experts = config.init_experts(&single(), &device());
    errors.push(experts.try_forward(Tensor::ones([3, 4], &device()), nobody).unwrap_err());
    // In forward and in backward, where a collective fails on one rank and all others are told.
    for at in [8, 14] {
        let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
            let (comm, _) = FaultyCommunicator::new(comm, Fault::Failure { rank: 0, at, mode: FaultMode::Error });
            let runtime = FsepRuntime::new(comm)?;
            let layer = config.init(&runtime, &device());
            let x = Tensor::<2>::ones([3, 4], &device()).require_grad();
            Ok(runtime.run(|| layer.forward(x).sum().backward()).err())
        });
        for error in results.into_iter().map(|result| result.unwrap().expect("the injected error")) {
            assert!(matches!(error, FsepError::Comm(_)), "{error}");
        }
    }
    let silent = printed.load(Ordering::Relaxed);

    // Nobody waits for the error: whoever loses the program has to read why.
    let layer = config.init(&single(), &device());
    let payload = catch_unwind(AssertUnwindSafe(|| layer.forward(wrong()))).unwrap_err();
    set_hook(before);
    assert!(matches!(errors[0], FsepError::Shape { .. }) && errors[1] == FsepError::NoExpert { layer: 0, rank: 0 });
    assert_eq!((silent, printed.load(Ordering::Relaxed)), (0, 1));
    let message = payload.downcast_ref::<String>().expect("a message");
    assert!(message.contains(&errors[0].to_string()), "{message}");
}
