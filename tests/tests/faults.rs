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
    ExpertParallelism, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::{
        CommError, Communicator, Operation, ReduceBuffer, ReduceOp,
        local::{LaunchConfig, RankError},
    },
    moe::RouterForcing,
    train::{PlannerConfig, clip_grad_norm, sync_gradients},
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{Fault, FaultMode, FaultyCommunicator, device, launch};

const RANKS: usize = 3;
const LIMIT: Duration = Duration::from_secs(5);

/// Forward, backward, gradient sync and clipping of two layers; returns the calls made.
fn step(comm: Arc<dyn Communicator>, fault: Fault) -> Result<usize, FsepError> {
    let (comm, calls) = FaultyCommunicator::new(comm, fault);
    let runtime = FsepRuntime::new(comm)?;
    let config = FSEPMoEConfig::new(4, 6, 4);
    let model = vec![config.try_init(&runtime, &device())?, config.try_init(&runtime, &device())?];
    let mut grads = runtime.run(|| {
        let x = Tensor::<2>::random([6, 4], Distribution::Default, &device()).require_grad();
        let y = model.iter().fold(x, |x, layer| x.clone() + layer.forward(x));
        GradientsParams::from_grads(y.sum().backward(), &model)
    })?;
    runtime.run(|| -> Result<(), FsepError> {
        sync_gradients(&runtime, &model, &mut grads)?;
        clip_grad_norm(&runtime, &model, &mut grads, 1.0).map(|_| ())
    })??;
    Ok(calls.made.load(Ordering::Relaxed))
}

#[test]
fn a_fault_at_any_collective_is_reported_by_every_other_rank() {
    let never = Fault::Failure { rank: 1, at: usize::MAX, mode: FaultMode::Panic };
    let calls = launch(&LaunchConfig::new(RANKS), |comm| step(comm, never));
    let calls = calls.into_iter().map(Result::unwrap).max().unwrap();
    // The runtime and its groups; two layers of options, counts, 3 exchanges forward and 4 backward, each started and waited for; then sync and
    // clipping.
    assert_eq!(calls, 3 + 2 * (2 + 2 * 7) + 3);

    for mode in [FaultMode::Panic, FaultMode::Error] {
        for at in 0..calls {
            let victim = at % RANKS;
            let fault = Fault::Failure { rank: victim, at, mode };
            let start = Instant::now();
            let results = launch(&LaunchConfig::new(RANKS), |comm| step(comm, fault));
            assert!(start.elapsed() < LIMIT, "{fault:?} took {:?}", start.elapsed());
            for (rank, result) in results.into_iter().enumerate() {
                let error = result.expect_err("no rank finishes the step");
                if rank == victim {
                    assert!(error.to_string().contains("injected"), "{fault:?}: {error}");
                    continue;
                }
                let RankError::Failed { error, .. } = error else { panic!("{fault:?}: {error}") };
                let FsepError::Comm(CommError::PeerFailed { rank, operation, reason, lost: false }) = error else {
                    panic!("{fault:?}: {error}")
                };
                assert_eq!(rank, victim);
                assert!(!operation.is_empty() && reason.contains("injected"), "{fault:?}: {operation}: {reason}");
            }
        }
    }
}

#[test]
fn a_panic_between_two_layers_is_reported() {
    let start = Instant::now();
    let results = launch(&LaunchConfig::new(RANKS), |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let config = FSEPMoEConfig::new(4, 6, 4);
        let (first, second) = (config.try_init(&runtime, &device())?, config.try_init(&runtime, &device())?);
        let result = runtime.run(|| {
            let hidden = first.forward(Tensor::<2>::ones([6, 4], &device()));
            assert!(runtime.rank() != 2, "the model of rank 2 is broken");
            second.forward(hidden)
        });
        // Nothing is poisoned: parameters can be saved, and what needs the group says again why it cannot go on.
        assert_eq!(first.experts.weight.val().into_data().iter::<f32>().count(), 4 * 72 / RANKS);
        let again = second.try_forward(Tensor::<2>::ones([6, 4], &device()).require_grad());
        assert!(matches!(again, Err(FsepError::Comm(CommError::PeerFailed { rank: 2, .. }))), "{again:?}");
        result.map(|_| ())
    });
    assert!(start.elapsed() < LIMIT);
    for (rank, result) in results.into_iter().enumerate() {
        let Err(RankError::Failed { error, .. }) = result else { panic!("{result:?}") };
        match error {
            FsepError::Panicked(message) if rank == 2 => assert_eq!(message, "the model of rank 2 is broken"),
            FsepError::Comm(CommError::PeerFailed { rank: 2, operation, reason, lost: false }) if rank != 2 => {
                assert!(operation.contains("of layer 1"), "{operation}");
                assert!(reason.contains("the model of rank 2 is broken"), "{reason}");
            }
            other => panic!("rank {rank}: {other}"),
        }
    }
}

#[test]
fn ranks_with_different_models_are_told() {
    let base = || FSEPMoEConfig::new(4, 6, 4).with_slots_per_rank(Some(2));
    let other = |config: FSEPMoEConfig| config.with_slots_per_rank(Some(2));
    let tracked = |rank: usize| rank == 1;
    for (what, theirs, tracks_input) in [
        ("`num_moe_experts`", other(FSEPMoEConfig::new(4, 6, 3)), false),
        ("`moe_ffn_hidden_size`", other(FSEPMoEConfig::new(4, 8, 4)), false),
        ("`moe_router_topk`", base().with_moe_router_topk(1), false),
        ("`slots_per_rank`", base().with_slots_per_rank(Some(3)), false),
        ("`expert_parallelism`", base().with_expert_parallelism(ExpertParallelism::Static), false),
        // Nothing that is exchanged shows these.
        ("`moe_aux_loss_coeff`", base().with_moe_aux_loss_coeff(0.1), false),
        ("`moe_z_loss_coeff`", base().with_moe_z_loss_coeff(0.1), false),
        ("`moe_router_force`", base().with_moe_router_force(Some(RouterForcing::LoadBalancing)), false),
        ("the wanted gradients", base(), true),
    ] {
        let config = LaunchConfig::new(2).with_timeout(Duration::from_secs(20));
        let start = Instant::now();
        let results = launch(&config, |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let config = if runtime.rank() == 1 { theirs.clone() } else { base() };
            let layer = config.try_init(&runtime, &device())?;
            runtime.run(|| {
                let x = Tensor::<2>::ones([6, 4], &device());
                let x = if tracks_input && tracked(runtime.rank()) { x.require_grad() } else { x };
                drop(layer.forward(x).sum().backward());
            })
        });
        assert!(start.elapsed() < LIMIT);
        let messages: Vec<String> = results.into_iter().map(|r| r.expect_err(what).to_string()).collect();
        let told = |m: &String| m.contains(what) && m.contains("of layer 0");
        assert!(messages.iter().all(told), "{what}: {messages:?}");
    }
}

#[test]
fn ranks_with_different_runtimes_are_told() {
    let base = FsepRuntimeConfig::new;
    for (what, theirs) in [
        ("seed", base().with_seed(1)),
        ("topology", base().with_ranks_per_node(1)),
        ("dispatcher", base().with_dispatcher(|| PlannerStrategy::Paper.dispatcher())),
        ("repair", base().with_repair(None)),
    ] {
        let results = launch(&LaunchConfig::new(2), |comm| {
            let config = if comm.rank() == 1 { theirs.clone() } else { base() };
            config.init(comm).map(|_| ())
        });
        for result in results {
            let Err(RankError::Failed { error: FsepError::Config(message), .. }) = result else { panic!("{result:?}") };
            assert!(message.contains(&format!("ranks 0 and 1 differ in `{what}`")), "{message}");
        }
    }
}

/// Starts ranks of which rank 1 behaves otherwise; returns rank 0's error, which does not come of the time that passes.
fn other_rank_does(act: impl Fn(&dyn Communicator) -> Result<(), CommError> + Sync) -> CommError {
    let start = Instant::now();
    let error = other_rank_does_within(Duration::from_secs(20), act);
    assert!(start.elapsed() < LIMIT);
    error
}

/// As [`other_rank_does`], in a group that waits for so long.
fn other_rank_does_within(
    timeout: Duration,
    act: impl Fn(&dyn Communicator) -> Result<(), CommError> + Sync,
) -> CommError {
    let config = LaunchConfig::new(2).with_timeout(timeout);
    let mut results = launch(&config, |comm| {
        if comm.rank() == 1 {
            return act(comm.as_ref());
        }
        comm.all_reduce(Operation::of_layer("sum", 3), ReduceBuffer::F32(&mut [1.0, 2.0]), ReduceOp::Sum)
    });
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
fn a_rank_that_leaves_after_a_forward_pass_without_backward_is_named_at_once() {
    let start = Instant::now();
    let mut results = launch(&LaunchConfig::new(2), |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let layer = FSEPMoEConfig::new(4, 6, 4).try_init(&runtime, &device())?;
        let x = || Tensor::<2>::ones([6, 4], &device());
        let _ = layer.try_forward(x())?;
        if runtime.rank() == 0 { layer.try_forward(x()).map(|_| ()) } else { Ok(()) }
    });
    assert!(start.elapsed() < LIMIT);
    let Err(RankError::Failed { error, .. }) = results.swap_remove(0) else { panic!("rank 0 was alone") };
    assert!(matches!(error, FsepError::Comm(CommError::PeerFailed { rank: 1, .. })), "{error}");
}

/// Waits until another rank has given up.
fn wait_for_failure(comm: &dyn Communicator) {
    let start = Instant::now();
    while comm.failure().is_none() {
        assert!(start.elapsed() < LIMIT, "nobody gives up");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_rank_that_never_comes_times_out() {
    let error = other_rank_does_within(Duration::from_millis(300), |comm| {
        wait_for_failure(comm);
        Ok(())
    });
    assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [1]), "{error}");
}

#[test]
fn a_rank_that_comes_too_late_is_told() {
    let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_millis(200)), |comm| {
        if comm.rank() == 1 {
            wait_for_failure(comm.as_ref());
        }
        comm.barrier(Operation::new("meeting"))
    });
    for result in results {
        let Err(RankError::Failed { error, .. }) = result else { panic!("{result:?}") };
        assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [1]), "{error}");
    }
}

#[test]
fn different_collectives_name_both_sides() {
    let error = other_rank_does(|comm| comm.barrier(Operation::new("somewhere else")));
    let CommError::Mismatch { operation, peer_operation, .. } = &error else { panic!("{error}") };
    assert!(operation.contains("sum of layer 3") && peer_operation.contains("somewhere else"), "{error}");
}

#[test]
fn different_layouts_name_both_sides() {
    let error = other_rank_does(|comm| {
        let operation = Operation::of_layer("sum", 3).under_layout(0xbeef);
        comm.all_reduce(operation, ReduceBuffer::F32(&mut [1.0, 2.0]), ReduceOp::Sum)
    });
    let CommError::Mismatch { peer_operation, .. } = &error else { panic!("{error}") };
    assert!(peer_operation.contains("sum of layer 3 (layout 000000000000beef)"), "{error}");
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

#[test]
fn a_rank_that_fails_while_layouts_are_agreed_on_is_a_typed_error() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let _layer = FSEPMoEConfig::new(4, 6, 4).try_init(&runtime, &device())?;
        if runtime.rank() == 1 {
            runtime.comm().abort("out of luck");
            return Ok(());
        }
        let error = PlannerConfig::new(PlannerStrategy::MinMax).init().step(&runtime).unwrap_err();
        assert!(matches!(error, FsepError::Comm(CommError::PeerFailed { rank: 1, .. })), "{error}");
        Ok(())
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}
