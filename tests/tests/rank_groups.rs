//! Groups of ranks that are processes, over the engine that the suite was built for: see `rank_processes.rs`.

use std::time::Duration;

#[cfg(feature = "mpi")]
use burn_fsep::comm::mpi::MpiConfig;
use burn_fsep::comm::{CommError, Communicator, Groups, Operation, ReduceBuffer, ReduceOp};
#[cfg(feature = "mpi")]
use burn_fsep_tests::rank_over_mpi;
use burn_fsep_tests::{Launcher, RankProcesses, check_groups, rank_of_process};

const OP: Operation = Operation::of_layer("meeting", 4);
const PATIENCE: Duration = Duration::from_secs(120);
/// Within this time a survivor has to have ended.
const LIMIT: Duration = Duration::from_secs(30);

#[test]
#[ignore = "a rank of the test below"]
fn groups_rank() {
    rank_of_process(|comm, _| {
        for experts_ranks in [1, 2, 4, 8].into_iter().filter(|experts_ranks| *experts_ranks <= comm.size()) {
            check_groups(&comm, experts_ranks)?;
        }
        Ok(())
    });
}

#[test]
fn groups_of_processes_have_all_collectives() {
    for ranks in [4, 8] {
        start(ranks, "groups_rank").wait_until_passed(PATIENCE);
    }
}

/// One of four ranks or more in two groups that share experts: works in its group without end, unless it `act`s.
fn group_rank(act: impl FnOnce(&dyn Communicator, usize) -> Option<Result<(), CommError>>) {
    rank_of_process(|comm, _| {
        let (rank, half) = (comm.rank(), comm.size() / 2);
        let groups = Groups::new(comm, half)?;
        let group = groups.experts().as_ref();
        sum(group)?;
        println!("a group works");
        if let Some(result) = act(group, rank) {
            return Ok(result?);
        }
        loop {
            sum(group)?;
        }
    });
}

fn sum(group: &dyn Communicator) -> Result<(), CommError> {
    group.all_reduce(OP, ReduceBuffer::F32(&mut [1.0, 2.0]), ReduceOp::Sum)
}

/// Waits until all ranks but the `victim` have failed and have said all of this.
fn expect(mut processes: RankProcesses, victim: Option<usize>, ranks: usize, parts: &[&str]) {
    let took = processes.wait(LIMIT);
    println!("{ranks} processes in two groups: all ended within {:.1} s", took.as_secs_f64());
    for rank in (0..ranks).filter(|rank| Some(*rank) != victim) {
        let said = processes.said(rank);
        assert!(!processes.passed(rank), "rank {rank} goes on");
        assert!(parts.iter().all(|part| said.contains(part)), "rank {rank} does not say {parts:?}:\n{said}");
    }
}

fn start(ranks: usize, test: &str) -> RankProcesses {
    RankProcesses::start_test(Launcher::OF_SUITE, ranks, test)
}

#[test]
#[ignore = "a rank of the test below"]
fn endless_rank() {
    group_rank(|_, _| None);
}

#[test]
fn the_loss_of_a_process_is_an_error_in_all_groups_that_names_it() {
    for (ranks, victim) in [(4, 3), (8, 1)] {
        let mut processes = start(ranks, "endless_rank");
        (0..ranks).for_each(|rank| processes.wait_for(rank, "a group works", PATIENCE));
        assert!(processes.kill(victim));
        expect(processes, Some(victim), ranks, &[&format!("rank {victim} failed")]);
    }
}

#[test]
#[ignore = "a rank of the test below"]
fn aborting_rank() {
    group_rank(|group, rank| {
        (rank == 3).then(|| {
            group.abort("out of luck");
            sum(group)
        })
    });
}

#[test]
fn a_process_that_gives_up_is_named_in_all_groups() {
    expect(start(4, "aborting_rank"), None, 4, &["out of luck"]);
}

/// Where the ranks compare what they do: over MPI and NCCL in debug builds.
#[test]
#[ignore = "a rank of the test below"]
fn disagreeing_rank() {
    group_rank(|group, rank| (rank == 3).then(|| group.barrier(Operation::new("somewhere else"))));
}

#[cfg(debug_assertions)]
#[test]
fn processes_of_a_group_that_disagree_are_named_in_all_groups() {
    expect(start(4, "disagreeing_rank"), None, 4, &["ranks disagree", "rank 2", "rank 3", "somewhere else"]);
}

/// How long a rank waits here. The start of MPI has to fit in, too.
#[cfg(feature = "mpi")]
const TIMEOUT: Duration = Duration::from_secs(8);

#[cfg(feature = "mpi")]
#[test]
#[ignore = "a rank of the test below"]
fn absent_rank() {
    rank_over_mpi(&MpiConfig::new().with_timeout(TIMEOUT), |comm, _| {
        let rank = comm.rank();
        // Ranks 0 and 2, ranks 1 and 3.
        let group = Groups::new(comm, 2)?.replicas().clone();
        if rank == 3 {
            std::thread::sleep(TIMEOUT + Duration::from_secs(4));
        }
        loop {
            sum(group.as_ref())?;
        }
        #[allow(unreachable_code)]
        Ok(())
    });
}

#[cfg(feature = "mpi")]
#[test]
fn a_process_that_does_not_come_is_named_in_all_groups() {
    expect(start(4, "absent_rank"), None, 4, &["rank(s) [3] did not take part"]);
}
