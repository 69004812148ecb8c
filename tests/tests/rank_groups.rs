//! Groups of ranks that are processes, over the engine that the suite was built for: see `rank_processes.rs`.

use std::time::Duration;

use burn_fsep::comm::{CommError, Communicator, Groups, Operation, ReduceBuffer, ReduceOp};
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

/// What only MPI has: a timeout of its own, and a split that waits in the library.
#[cfg(feature = "mpi")]
mod mpi {
    use std::sync::Arc;

    use burn::tensor::Bytes;
    use burn_fsep::{
        FsepError,
        comm::{ExchangePlan, PendingExchange, mpi::MpiConfig},
        launch::RankEnvironment,
    };
    use burn_fsep_tests::rank_over_mpi;

    use super::*;

    /// How long a rank waits. The start of MPI has to fit in, too.
    const TIMEOUT: Duration = Duration::from_secs(8);

    #[test]
    #[ignore = "a rank of the test below"]
    fn absent_rank() {
        rank_over_mpi(&MpiConfig::new().with_timeout(TIMEOUT), |comm, _| -> Result<(), FsepError> {
            let rank = comm.rank();
            // Ranks 0 and 2, ranks 1 and 3.
            let group = Groups::new(comm, 2)?.replicas().clone();
            if rank == 3 {
                std::thread::sleep(TIMEOUT + Duration::from_secs(4));
            }
            loop {
                sum(group.as_ref())?;
            }
        });
    }

    #[test]
    fn a_process_that_does_not_come_is_named_in_all_groups() {
        expect(start(4, "mpi::absent_rank"), None, 4, &["rank(s) [3] did not take part"]);
    }

    /// A control group whose rank 3 is lost when all have split it, before it splits MPI's communicator.
    #[derive(Debug)]
    struct Trap(Arc<dyn Communicator>);

    impl Communicator for Trap {
        fn rank(&self) -> usize {
            self.0.rank()
        }

        fn size(&self) -> usize {
            self.0.size()
        }

        fn world_rank(&self, rank: usize) -> usize {
            self.0.world_rank(rank)
        }

        fn start_all_to_all_v(
            &self,
            operation: Operation,
            send: Arc<Bytes>,
            plan: ExchangePlan,
        ) -> Result<Box<dyn PendingExchange>, CommError> {
            self.0.start_all_to_all_v(operation, send, plan)
        }

        fn abort(&self, reason: &str) {
            self.0.abort(reason);
        }

        fn failure(&self) -> Option<CommError> {
            self.0.failure()
        }

        fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
            self.0.duplicate(name)
        }

        fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<dyn Communicator>, CommError> {
            let group = self.0.split(name, color, key)?;
            if self.rank() == 3 {
                // Until the others wait in MPI.
                std::thread::sleep(Duration::from_secs(1));
                std::process::abort();
            }
            Ok(group)
        }
    }

    #[test]
    #[ignore = "a rank of the test below"]
    fn trapped_rank() {
        let config = RankEnvironment::from_env().unwrap().process_config().unwrap();
        let result = config.run(|control| {
            MpiConfig::new().run(Arc::new(Trap(control)), |comm| -> Result<(), FsepError> {
                let other = comm.duplicate("other")?;
                let error = Groups::new(comm, 2).unwrap_err();
                // What is left of MPI is dropped without waiting for it, and refused.
                let told = sum(other.as_ref()).unwrap_err().to_string();
                assert!(told.contains("rank 3 failed"), "{told}");
                Err(error.into())
            })
        });
        panic!("{}", result.unwrap_err());
    }

    #[test]
    fn a_process_that_is_lost_while_mpi_splits_is_named() {
        expect(start(4, "mpi::trapped_rank"), Some(3), 4, &["rank 3 failed while this rank was in `experts`"]);
    }
}
