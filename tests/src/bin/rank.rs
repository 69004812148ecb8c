//! A rank in a process of its own, for tests that start and kill processes: `rank TASK`, with a launcher's variables.
//!
//! It prints `at TASK` when it has come to the place where a test may kill it, and its error, if it gets one.

use std::{io::Write, process::ExitCode, sync::Arc, time::Duration};

use burn::tensor::Bytes;
use burn_fsep::{
    FsepError, FsepRuntime,
    comm::{Block, CommError, Communicator, ExchangePlan, Groups, Operation, ReduceBuffer, ReduceOp},
    launch::RankEnvironment,
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{GradientSync, HandTraining, LayoutSource, task_items, train_by_hand};

fn main() -> ExitCode {
    let task = std::env::args().nth(1).unwrap_or_default();
    match run(&task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &str) -> Result<(), Box<dyn std::error::Error>> {
    let environment = RankEnvironment::from_env()?;
    let mut config = environment.process_config()?;
    if let Some(seconds) = std::env::var("RENDEZVOUS_SECONDS").ok().and_then(|text| text.parse().ok()) {
        config = config.with_rendezvous_timeout(Duration::from_secs(seconds));
    }
    if task == "meeting" {
        say("at meeting");
    }
    Ok(config.run(|comm| perform(task, comm))?)
}

fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

fn perform(task: &str, comm: Arc<dyn Communicator>) -> Result<(), FsepError> {
    let meeting = Operation::of_layer("meeting", 4);
    match task {
        "meeting" => comm.barrier(meeting)?,
        "gathers" => loop_forever(task, || comm.all_gather(meeting, &[0; 100], &mut vec![0; 100 * comm.size()]))?,
        "sums" => {
            loop_forever(task, || comm.all_reduce(meeting, ReduceBuffer::F32(&mut vec![1.0; 1 << 18]), ReduceOp::Sum))?;
        }
        // Half of the ranks have no collective with the other half.
        "groups" => {
            let ranks = comm.size() / 2;
            let group = Groups::new(comm, ranks)?.experts().clone();
            loop_forever(task, || group.all_gather(meeting, &[0; 100], &mut vec![0; 100 * ranks]))?;
        }
        "exchanges" => loop_forever(task, || exchange(comm.as_ref(), 4 << 20))?,
        // Rank 1 takes part in the meeting, as rank 0 does; rank 2 does not come.
        "third" => {
            if comm.rank() == 2 {
                comm.barrier(Operation::new("start"))?;
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                    if let Some(failure) = comm.failure() {
                        return Err(failure.into());
                    }
                }
            }
            comm.barrier(Operation::new("start"))?;
            say("at third");
            comm.barrier(meeting)?;
        }
        // Nobody is in a collective when the rank is lost.
        "computing" => {
            comm.barrier(Operation::new("start"))?;
            say("at computing");
            while comm.failure().is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
            comm.barrier(meeting)?;
        }
        "leaving" if comm.rank() == 1 => comm.barrier(Operation::new("start"))?,
        "leaving" => {
            comm.barrier(Operation::new("start"))?;
            comm.barrier(meeting)?;
        }
        "panicking" => {
            comm.barrier(Operation::new("start"))?;
            assert!(comm.rank() != 1, "rank 1 is broken");
            comm.barrier(meeting)?;
        }
        "training" | "endless training" => {
            let steps = if task == "training" { 8 } else { usize::MAX };
            let layouts = LayoutSource::Planner(PlannerStrategy::MinMax);
            let training =
                HandTraining { steps, batch: 8 * comm.size(), clip: 1.0, layouts, sync: GradientSync::AfterBackward };
            say(&format!("at {task}"));
            let trained = train_by_hand(&FsepRuntime::new(comm)?, &task_items(8 * 3 * 8, 3), &training)?;
            let bits: Vec<u32> = trained.losses.iter().map(|loss| loss.to_bits()).collect();
            say(&format!("losses {bits:?}"));
        }
        other => return Err(FsepError::Config(format!("no such task: {other}"))),
    }
    Ok(())
}

fn loop_forever(task: &str, mut collective: impl FnMut() -> Result<(), CommError>) -> Result<(), CommError> {
    collective()?;
    say(&format!("at {task}"));
    loop {
        collective()?;
    }
}

/// Every rank sends `len` bytes to every rank.
fn exchange(comm: &dyn Communicator, len: usize) -> Result<(), CommError> {
    let blocks: Vec<_> = (0..comm.size()).map(|peer| Block { peer, offset: peer * len, len }).collect();
    let total = len * comm.size();
    let plan = ExchangePlan { sends: blocks.clone(), recvs: blocks, recv_len: total, send_len: total };
    let send = Arc::new(Bytes::from_elems(vec![comm.rank() as u8; total]));
    comm.start_all_to_all_v(Operation::of_layer("meeting", 4), send, plan)?.wait(&mut vec![0; total])
}
