//! A rank that fails ends the step on every rank with an error that names it: no hang, no abort.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use burn::{
    optim::GradientsParams,
    tensor::{Distribution, Tensor},
};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntime,
    comm::{
        CommError, Communicator, Operation, ReduceBuffer, ReduceOp,
        local::{LaunchConfig, RankError, launch},
    },
    train::{clip_grad_norm, sync_gradients},
};
use burn_fsep_tests::{Fault, FaultMode, FaultyCommunicator, device};

const RANKS: usize = 3;
const LIMIT: Duration = Duration::from_secs(5);

/// Forward, backward, gradient sync and clipping of two layers; returns the collectives made.
fn step(comm: Arc<dyn Communicator>, fault: Fault) -> Result<usize, FsepError> {
    let (comm, calls) = FaultyCommunicator::new(comm, fault);
    let runtime = FsepRuntime::new(comm)?;
    let config = FSEPMoEConfig::new(4, 6, 4);
    let model = vec![config.try_init(&runtime, &device())?, config.try_init(&runtime, &device())?];
    let mut grads = runtime.run(|| {
        let x = Tensor::<2>::random([6, 4], Distribution::Default, &device());
        let y = model.iter().fold(x, |x, layer| x.clone() + layer.forward(x));
        GradientsParams::from_grads(y.sum().backward(), &model)
    })?;
    runtime.run(|| -> Result<(), FsepError> {
        sync_gradients(&runtime, &model, &mut grads)?;
        clip_grad_norm(&runtime, &model, &mut grads, 1.0).map(|_| ())
    })??;
    Ok(calls.load(Ordering::Relaxed))
}

#[test]
fn a_fault_at_any_collective_is_reported_by_every_other_rank() {
    let never = Fault { rank: 1, at: usize::MAX, mode: FaultMode::Panic };
    let calls = launch(&LaunchConfig::new(RANKS), |comm| step(comm, never));
    let calls = calls.into_iter().map(Result::unwrap).max().unwrap();
    assert!(calls > 10, "a step of two layers has many collectives, not {calls}");

    for mode in [FaultMode::Panic, FaultMode::Error] {
        for at in 0..calls {
            let fault = Fault { rank: 1, at, mode };
            let start = Instant::now();
            let results = launch(&LaunchConfig::new(RANKS), |comm| step(comm, fault));
            assert!(start.elapsed() < LIMIT, "{fault:?} took {:?}", start.elapsed());
            for (rank, result) in results.into_iter().enumerate() {
                let error = result.expect_err("no rank finishes the step");
                if rank == fault.rank {
                    assert!(error.to_string().contains("injected"), "{fault:?}: {error}");
                    continue;
                }
                let RankError::Failed { error, .. } = error else { panic!("{fault:?}: {error}") };
                let FsepError::Comm(CommError::PeerFailed { rank, operation, reason }) = error else {
                    panic!("{fault:?}: {error}")
                };
                assert_eq!(rank, fault.rank);
                assert!(!operation.is_empty() && reason.contains("injected"), "{fault:?}: {operation}: {reason}");
            }
        }
    }
}

/// Starts ranks of which rank 1 behaves otherwise; returns rank 0's error.
fn other_rank_does(act: impl Fn(&dyn Communicator) -> Result<(), CommError> + Sync) -> CommError {
    let config = LaunchConfig::new(2).with_timeout(Duration::from_millis(300));
    let start = Instant::now();
    let mut results = launch(&config, |comm| {
        if comm.rank() == 1 {
            return act(comm.as_ref());
        }
        comm.all_reduce(Operation::of_layer("sum", 3), ReduceBuffer::F32(&mut [1.0, 2.0]), ReduceOp::Sum)
    });
    assert!(start.elapsed() < LIMIT);
    match results.swap_remove(0) {
        Err(RankError::Failed { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_rank_that_leaves_is_named() {
    let error = other_rank_does(|_| Ok(()));
    assert!(matches!(error, CommError::PeerFailed { rank: 1, .. }), "{error}");
    assert!(error.to_string().contains("sum of layer 3"), "{error}");
}

#[test]
fn a_rank_that_never_comes_times_out() {
    let error = other_rank_does(|_| {
        std::thread::sleep(Duration::from_millis(900));
        Ok(())
    });
    assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [1]), "{error}");
}

#[test]
fn different_collectives_name_both_sides() {
    let error = other_rank_does(|comm| comm.barrier(Operation::new("somewhere else")));
    let CommError::Mismatch { operation, peer_operation, .. } = &error else { panic!("{error}") };
    assert!(operation.contains("sum of layer 3") && peer_operation.contains("somewhere else"), "{error}");
}

#[test]
fn different_sizes_name_both_sides() {
    let error = other_rank_does(|comm| {
        comm.all_reduce(Operation::of_layer("sum", 3), ReduceBuffer::F32(&mut [1.0]), ReduceOp::Sum)
    });
    assert!(matches!(error, CommError::Mismatch { .. }), "{error}");
}

#[test]
fn a_failed_group_stays_failed() {
    let results = launch(&LaunchConfig::new(2), |comm| {
        if comm.rank() == 0 {
            comm.abort("out of luck");
        }
        let first = comm.barrier(Operation::new("first")).unwrap_err();
        let second = comm.barrier(Operation::new("second")).unwrap_err();
        assert!(first.to_string().contains("out of luck") && second.to_string().contains("out of luck"));
        assert!(comm.failure().is_some());
        Ok::<_, CommError>(())
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}
