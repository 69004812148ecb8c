//! Groups of ranks, with ranks as threads: they work by themselves, and end together.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use burn::tensor::Bytes;
use burn_fsep::comm::{
    Block, CommError, Communicator, ExchangePlan, Groups, Operation, ReduceBuffer, ReduceOp,
    local::{LaunchConfig, RankError},
};
use burn_fsep_tests::{check_groups, launch};

const OP: Operation = Operation::of_layer("sum", 3);
/// What ends well before any timeout.
const LIMIT: Duration = Duration::from_secs(5);

#[test]
fn groups_have_all_collectives() {
    for ranks in [4, 8] {
        for experts_ranks in [1, 2, 4, 8].into_iter().filter(|experts_ranks| *experts_ranks <= ranks) {
            for result in launch(&LaunchConfig::new(ranks), |world| check_groups(&world, experts_ranks)) {
                result.unwrap();
            }
        }
    }
}

fn sum(group: &dyn Communicator) -> Result<(), CommError> {
    group.all_reduce(OP, ReduceBuffer::F32(&mut [1.0, 2.0]), ReduceOp::Sum)
}

/// Four ranks in two groups that share experts; rank 3 behaves otherwise than rank 2, and the other group works on without them.
/// Returns the errors of ranks 0, 1 and 2.
fn rank_3_does(timeout: Duration, act: impl Fn(&Groups) -> Result<(), CommError> + Sync) -> Vec<CommError> {
    let start = Instant::now();
    let mut results = launch(&LaunchConfig::new(4).with_timeout(timeout), |world| {
        let groups = Groups::new(world, 2)?;
        match groups.world().rank() {
            3 => act(&groups),
            2 => sum(groups.experts().as_ref()),
            _ => loop {
                sum(groups.experts().as_ref())?;
            },
        }
    });
    assert!(start.elapsed() < LIMIT);
    results.truncate(3);
    let error = |result| match result {
        Err(RankError::Failed { error, .. }) => error,
        other => panic!("{other:?}"),
    };
    results.into_iter().map(error).collect()
}

/// All others name rank 3, which says this.
fn expect_rank_3(errors: &[CommError], said: &str) {
    for error in errors {
        let CommError::PeerFailed { rank: 3, reason, operation, .. } = error else { panic!("{error}") };
        assert!(reason.contains(said) && operation == "sum of layer 3", "{error}");
    }
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_rank_that_gives_up_is_named_in_all_groups() {
    expect_rank_3(
        &rank_3_does(LONG, |groups| {
            groups.experts().abort("out of luck");
            Ok(())
        }),
        "out of luck",
    );
    let fails = |_: &Groups| {
        let (operation, reason) = (String::from("test"), String::from("out of order"));
        Err(CommError::InvalidArgument { operation, reason })
    };
    expect_rank_3(&rank_3_does(LONG, fails), "out of order");
    expect_rank_3(&rank_3_does(LONG, |_| panic!("rank 3 is broken")), "rank 3 is broken");
}

#[test]
fn a_rank_that_leaves_is_named_in_all_groups() {
    expect_rank_3(&rank_3_does(LONG, |_| Ok(())), "it left the group");
}

#[test]
fn ranks_of_a_group_that_disagree_are_named_in_all_groups() {
    for error in rank_3_does(LONG, |groups| groups.experts().barrier(Operation::new("somewhere else"))) {
        let CommError::Mismatch { rank, operation, peer, peer_operation, .. } = &error else { panic!("{error}") };
        let sides = [(*rank, operation), (*peer, peer_operation)];
        let said = |rank: usize| &sides.iter().find(|(named, _)| *named == rank).unwrap().1;
        assert!(said(2).contains("sum of layer 3") && said(3).contains("somewhere else"), "{error}");
    }
}

#[test]
fn blocks_that_do_not_match_name_the_worlds_ranks() {
    let errors = rank_3_does(LONG, |groups| {
        let exchange = |group: &dyn Communicator, len: usize| {
            let block = |len| vec![Block { peer: 0, offset: 0, len }];
            let plan = ExchangePlan { sends: block(1), recvs: block(len), recv_len: len, send_len: 1 };
            group.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(vec![0u8])), plan)?.wait(&mut vec![0; len])
        };
        exchange(groups.experts().split("alone", groups.experts().rank() as u64, 0)?.as_ref(), 2)
    });
    // Rank 2 does not split: it is that what differs.
    for error in errors {
        let CommError::Mismatch { rank: 2 | 3, peer: 2 | 3, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains("`alone`"), "{error}");
    }
}

#[test]
fn ranks_that_wait_for_each_other_in_a_circle_of_groups_time_out() {
    let config = LaunchConfig::new(4).with_timeout(Duration::from_millis(500));
    let results = launch(&config, |world| {
        let groups = Groups::new(world, 2)?;
        let rank = groups.world().rank();
        // 0 waits for 1, that one for 3, that one for 2, and that one for 0.
        let group = if [0, 3].contains(&rank) { groups.experts() } else { groups.replicas() };
        sum(group.as_ref())
    });
    for result in results {
        let Err(RankError::Failed { error, .. }) = result else { panic!("{result:?}") };
        let CommError::Timeout { missing, meanwhile, .. } = &error else { panic!("{error}") };
        // Nobody has been at a place where another one should have come: those are of other groups.
        assert!(missing.len() == 1 && meanwhile.is_none(), "{error}");
    }
}

#[test]
fn a_rank_that_never_comes_times_out_in_all_groups() {
    let wait_for_failure = |groups: &Groups| {
        let start = Instant::now();
        while groups.replicas().failure().is_none() {
            assert!(start.elapsed() < LIMIT, "nobody gives up");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    for error in rank_3_does(Duration::from_millis(500), wait_for_failure) {
        assert!(matches!(&error, CommError::Timeout { missing, .. } if *missing == [3]), "{error}");
    }
}
