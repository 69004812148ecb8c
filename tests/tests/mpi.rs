//! The MPI engine, with ranks that mpirun starts. Parity, training and the loss of a rank are in `rank_processes.rs`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use burn::tensor::Bytes;
use burn_fsep::{
    FsepError,
    comm::{
        Block, CommError, Communicator, ExchangePlan, Operation, PendingExchange, ReduceBuffer, ReduceOp,
        mpi::MpiConfig,
    },
    launch::RankEnvironment,
};
use burn_fsep_tests::{
    Launcher, RankProcesses, check_blocks, check_duplicates, check_gather_and_broadcast, check_reductions,
    check_wrong_arguments, rank_of_process, rank_over_mpi,
};

const OP: Operation = Operation::of_layer("meeting", 4);
const PATIENCE: Duration = Duration::from_secs(60);

/// Every rank sends `len` bytes of its number to every rank, in an exchange that is not waited for yet.
fn start_all_to_all(comm: &dyn Communicator, len: usize) -> Result<Box<dyn PendingExchange>, CommError> {
    let blocks: Vec<_> = (0..comm.size()).map(|peer| Block { peer, offset: peer * len, len }).collect();
    let total = len * comm.size();
    let plan = ExchangePlan { sends: blocks.clone(), recvs: blocks, recv_len: total, send_len: total };
    comm.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(vec![comm.rank() as u8; total])), plan)
}

fn finish_all_to_all(comm: &dyn Communicator, pending: Box<dyn PendingExchange>, len: usize) -> Result<(), CommError> {
    let mut received = vec![u8::MAX; len * comm.size()];
    pending.wait(&mut received)?;
    for (peer, part) in received.chunks_exact(len).enumerate() {
        assert!(part.iter().all(|&byte| byte == peer as u8), "{len} bytes from rank {peer}");
    }
    Ok(())
}

fn check_sizes(comm: &dyn Communicator) -> Result<(), CommError> {
    // Around the limits from which Open MPI asks the receiver before it sends, and far beyond.
    for len in [1, 255, 4 << 10, (4 << 10) + 1, 64 << 10, (64 << 10) + 1, 1 << 20, 16 << 20] {
        let pending = start_all_to_all(comm, len)?;
        finish_all_to_all(comm, pending, len)?;
    }
    // 64 MiB from each rank to its successor only, in two blocks that lie apart.
    let (len, rank, ranks) = (32 << 20, comm.rank(), comm.size());
    let block = |peer, offset| Block { peer, offset, len };
    let (next, before) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
    let plan = ExchangePlan {
        sends: vec![block(next, len + 1), block(next, 0)],
        recvs: vec![block(before, 0), block(before, len)],
        recv_len: 2 * len,
        send_len: 2 * len + 1,
    };
    let mut send = vec![rank as u8; 2 * len + 1];
    send[len + 1..].fill(100 + rank as u8);
    let mut received = vec![0; 2 * len];
    comm.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(send)), plan)?.wait(&mut received)?;
    assert!(received[..len].iter().all(|&byte| byte == 100 + before as u8));
    assert!(received[len..].iter().all(|&byte| byte == before as u8));
    Ok(())
}

fn check_empty_plans(comm: &dyn Communicator) -> Result<(), CommError> {
    let nothing = || Arc::new(Bytes::from_elems(Vec::<u8>::new()));
    comm.start_all_to_all_v(OP, nothing(), ExchangePlan::default())?.wait(&mut [])?;
    // Only rank 0 has something for rank 1.
    let block = |peer, is_it: bool| if is_it { vec![Block { peer, offset: 0, len: 3 }] } else { Vec::new() };
    let len = |is_it: bool| if is_it { 3 } else { 0 };
    let (sends, receives) = (comm.rank() == 0, comm.rank() == 1);
    let plan = ExchangePlan {
        sends: block(1, sends),
        recvs: block(0, receives),
        recv_len: len(receives),
        send_len: len(sends),
    };
    let mut received = vec![0; len(receives)];
    comm.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(vec![7u8; len(sends)])), plan)?.wait(&mut received)?;
    assert!(received.iter().all(|&byte| byte == 7));
    Ok(())
}

/// Some ranks give up a prefetch that others wait for; later exchanges are not disturbed.
fn check_dropped_prefetches(comm: &dyn Communicator) -> Result<(), CommError> {
    let prefetch = comm.duplicate("prefetch")?;
    for len in [10, 3 << 20] {
        let (first, second) =
            (start_all_to_all(prefetch.as_ref(), len)?, start_all_to_all(prefetch.as_ref(), len + 1)?);
        if comm.rank().is_multiple_of(2) {
            drop(first);
        } else {
            finish_all_to_all(comm, first, len)?;
        }
        finish_all_to_all(comm, second, len + 1)?;
    }
    // All give up, and give up the communicator as well.
    drop(start_all_to_all(prefetch.as_ref(), 3 << 20)?);
    // As a graph does that is never consumed; the job ends all the same.
    std::mem::forget(start_all_to_all(prefetch.as_ref(), 3 << 20)?);
    drop(prefetch);
    comm.barrier(OP)
}

#[test]
#[ignore = "a rank of the test below"]
fn collectives_rank() {
    rank_of_process(|comm, _| {
        let comm = comm.as_ref();
        check_wrong_arguments(comm)?;
        check_reductions(comm)?;
        check_gather_and_broadcast(comm)?;
        [1, 20_000, 300_000].into_iter().try_for_each(|unit| check_blocks(comm, unit))?;
        check_duplicates(comm)?;
        check_sizes(comm)?;
        check_empty_plans(comm)?;
        check_dropped_prefetches(comm)?;
        Ok(())
    });
}

#[test]
#[ignore = "a rank of the test below"]
fn unchecked_rank() {
    rank_over_mpi(&MpiConfig::new().with_check_signatures(false), |comm, _| {
        let comm = comm.as_ref();
        check_reductions(comm)?;
        check_gather_and_broadcast(comm)?;
        check_blocks(comm, 20_000)?;
        check_duplicates(comm)?;
        check_empty_plans(comm)?;
        check_dropped_prefetches(comm)?;
        Ok(())
    });
}

/// Rank 0 expects other lengths than rank 1 sends, which is noticed without comparison.
fn unequal_rank(expected: usize) {
    rank_over_mpi(&MpiConfig::new().with_check_signatures(false), |comm, _| {
        let peer = 1 - comm.rank();
        let len = if comm.rank() == 0 { expected } else { 20 };
        let block = |len| vec![Block { peer, offset: 0, len }];
        let plan = ExchangePlan { sends: block(20), recvs: block(len), recv_len: len, send_len: 20 };
        Ok(comm.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(vec![0u8; 20])), plan)?.wait(&mut vec![0; len])?)
    });
}

#[test]
#[ignore = "a rank of the test below"]
fn less_expected_rank() {
    unequal_rank(19);
}

#[test]
#[ignore = "a rank of the test below"]
fn more_expected_rank() {
    unequal_rank(21);
}

fn start(ranks: usize, test: &str) -> RankProcesses {
    RankProcesses::start_test(Launcher::RECOVERING_MPIRUN, ranks, test)
}

#[test]
fn collectives() {
    start(4, "collectives_rank").wait_until_passed(PATIENCE);
}

#[test]
fn without_comparison_all_works_and_lengths_are_compared() {
    start(4, "unchecked_rank").wait_until_passed(PATIENCE);
    for (test, expects, sends) in [
        ("less_expected_rank", "expects 19 bytes in all", "sends more"),
        ("more_expected_rank", "expects 21 bytes in all", "sends 20 bytes"),
    ] {
        let said = fail(2, test);
        assert!(said[0].contains(expects) && said[0].contains(sends), "{}", said[0]);
        assert!(said[1].contains("rank 0 failed"), "{}", said[1]);
    }
}

/// Rank 0 leaves MPI alone until rank 1 has got what rank 0 sends: it has to travel by itself.
#[test]
#[ignore = "a rank of the test below"]
fn computing_rank() {
    rank_of_process(|comm, folder| {
        let (len, arrived) = (64 << 20, folder.join("arrived"));
        let pending = start_all_to_all(comm.as_ref(), len)?;
        if comm.rank() == 1 {
            finish_all_to_all(comm.as_ref(), pending, len)?;
            std::fs::write(&arrived, "").unwrap();
            return Ok(());
        }
        let start = Instant::now();
        while !arrived.exists() {
            assert!(start.elapsed() < PATIENCE / 2, "nothing moves while this rank computes");
            std::thread::sleep(Duration::from_millis(1));
        }
        finish_all_to_all(comm.as_ref(), pending, len)?;
        Ok(())
    });
}

#[test]
fn exchanges_travel_behind_compute() {
    // Over TCP, for which the sender has to do something; memory is read by the receiver alone.
    let launcher = Launcher::Mpirun(&["--mca", "btl", "tcp,self"]);
    RankProcesses::start_test(launcher, 2, "computing_rank").wait_until_passed(PATIENCE);
}

/// How long a failing rank waits. The start of MPI has to fit in, too.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A rank that compares signatures and waits for a short time only.
fn failing_rank(program: impl FnOnce(Arc<dyn Communicator>) -> Result<(), FsepError>) {
    let config = MpiConfig::new().with_timeout(TIMEOUT).with_check_signatures(true);
    rank_over_mpi(&config, |comm, _| program(comm));
}

#[test]
#[ignore = "a rank of a test below"]
fn other_blocks_rank() {
    failing_rank(|comm| {
        let len = comm.rank() + 1;
        let peer = 1 - comm.rank();
        let block = |len| vec![Block { peer, offset: 0, len }];
        let plan = ExchangePlan { sends: block(2), recvs: block(len), recv_len: len, send_len: 2 };
        let send = Arc::new(Bytes::from_elems(vec![0u8; 2]));
        Ok(comm.start_all_to_all_v(OP, send, plan)?.wait(&mut vec![0; len])?)
    });
}

#[test]
#[ignore = "a rank of a test below"]
fn other_collective_rank() {
    failing_rank(|comm| {
        if comm.rank() == 1 {
            comm.barrier(Operation::new("somewhere else"))?;
        }
        Ok(comm.all_reduce(OP, ReduceBuffer::F32(&mut [1.0, 2.0]), ReduceOp::Sum)?)
    });
}

#[test]
#[ignore = "a rank of a test below"]
fn absent_rank() {
    failing_rank(|comm| {
        if comm.rank() == 1 {
            std::thread::sleep(2 * TIMEOUT);
        }
        Ok(comm.barrier(OP)?)
    });
}

#[test]
#[ignore = "a rank of a test below"]
fn aborting_rank() {
    failing_rank(|comm| {
        // On another thread than the collectives'.
        if comm.rank() == 1 {
            std::thread::scope(|scope| drop(scope.spawn(|| comm.abort("out of luck"))));
        }
        let first = comm.barrier(OP).unwrap_err();
        assert!(comm.failure().is_some());
        assert_eq!(comm.barrier(OP).unwrap_err(), first);
        Err(first.into())
    });
}

#[test]
#[ignore = "a rank of a test below"]
fn panicking_rank() {
    failing_rank(|comm| {
        assert!(comm.rank() != 1, "rank 1 is broken");
        Ok(comm.barrier(OP)?)
    });
}

#[test]
#[ignore = "a rank of a test below"]
fn leaving_rank() {
    failing_rank(|comm| {
        comm.barrier(Operation::new("start"))?;
        if comm.rank() != 1 {
            comm.barrier(OP)?;
        }
        Ok(())
    });
}

/// Runs ranks that must all end with an error; returns what they say.
fn fail(ranks: usize, test: &str) -> Vec<String> {
    let mut processes = start(ranks, test);
    processes.wait(PATIENCE);
    let said: Vec<_> = (0..ranks).map(|rank| processes.said(rank)).collect();
    for (rank, said) in said.iter().enumerate() {
        assert!(said.contains("panicked"), "rank {rank} does not fail\n{}", processes.all_said());
    }
    said
}

#[test]
fn ranks_that_disagree_name_both_sides() {
    let said = fail(2, "other_blocks_rank");
    let named = "meeting of layer 4`: expects a block of 1 bytes";
    assert!(said[0].contains(named) && said[0].contains("sends a block of 2 bytes"), "{said:?}");
    let said = fail(2, "other_collective_rank");
    assert!(said[0].contains("of 2 f32") && said[0].contains("somewhere else"), "{said:?}");
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let said = fail(3, "absent_rank");
    for text in said {
        assert!(text.contains("rank(s) [1] did not take part"), "{text}");
    }
}

#[test]
fn a_rank_that_leaves_is_named() {
    let said = fail(3, "leaving_rank");
    for rank in [0, 2] {
        assert!(said[rank].contains("rank(s) [1] did not take part"), "{said:?}");
    }
}

#[test]
fn a_rank_that_gives_up_says_why() {
    for text in fail(3, "aborting_rank") {
        assert!(text.contains("rank 1 failed") && text.contains("out of luck"), "{text}");
    }
    let said = fail(3, "panicking_rank");
    for rank in [0, 2] {
        assert!(said[rank].contains("rank 1 failed") && said[rank].contains("rank 1 is broken"), "{said:?}");
    }
}

/// MPI's start waits for all ranks, and by itself for ever.
#[test]
#[ignore = "a rank of the test below"]
fn starting_rank() {
    let environment = RankEnvironment::from_env().unwrap();
    let result = environment.process_config().unwrap().run(|control| -> Result<(), CommError> {
        if control.rank() == 1 {
            std::process::abort();
        }
        MpiConfig::new().run(control, |_| Ok(()))
    });
    panic!("{result:?}");
}

#[test]
fn a_rank_lost_before_mpi_starts_is_named() {
    let mut processes = start(3, "starting_rank");
    assert!(processes.wait(PATIENCE) < Duration::from_secs(28), "as late as a timeout");
    for rank in [0, 2] {
        let said = processes.said(rank);
        assert!(said.contains("PeerFailed { rank: 1,"), "rank {rank}: {said}");
    }
}

/// Nobody is in a collective when the rank is lost.
#[test]
#[ignore = "a rank of the test below"]
fn waiting_rank() {
    rank_of_process(|comm, _| {
        comm.barrier(OP)?;
        println!("all are here");
        let start = Instant::now();
        while comm.failure().is_none() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Longer than mpirun takes to see the loss and gives ranks after SIGTERM.
        std::thread::sleep(Duration::from_secs(8));
        Ok(comm.barrier(OP)?)
    });
}

fn lose_rank_2(launcher: Launcher) -> RankProcesses {
    let mut processes = RankProcesses::start_test(launcher, 4, "waiting_rank");
    (0..4).for_each(|rank| processes.wait_for(rank, "all are here", PATIENCE));
    assert!(processes.kill(2));
    processes.wait(PATIENCE);
    processes
}

#[test]
fn survivors_can_say_who_was_lost_if_mpirun_lets_them() {
    // Of mpirun's own status this says nothing: it is 0 then.
    let processes = lose_rank_2(Launcher::RECOVERING_MPIRUN);
    for rank in [0, 1, 3] {
        let (said, named) = (processes.said(rank), "rank 2 failed while this rank was in `meeting of layer 4`");
        assert!(said.contains(named), "rank {rank}: {said}");
    }
    // Without, it ends them, and names the rank that was lost by itself.
    let mut processes = lose_rank_2(Launcher::Mpirun(&[]));
    let (code, said) = processes.mpirun();
    assert_ne!(code, Some(0));
    assert!(said.contains("process rank 2") && said.contains("signal 9"), "{said}");
    for rank in [0, 1, 3] {
        let said = processes.said(rank);
        assert!(!said.contains("rank 2 failed"), "rank {rank}: {said}");
    }
}
