//! Ranks as processes: over sockets on the CPU; with the feature `mpi` over MPI; with `nccl` over NCCL, where processes that
//! share a GPU exchange between its buffers.

use std::{path::Path, time::Duration};

use burn_fsep::{FSEPMoEConfig, FsepError, FsepRuntimeConfig};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{
    GradientSync, HandTraining, Launcher, LayoutSource, ParityCase, ParityStep, RankProcesses, SplitAny, TOKEN_TRAVEL,
    Trained, dense_loss_curve, rank_of_process, small_slots, task_items, train_by_hand,
};
use serde::{Serialize, de::DeserializeOwned};

/// Started by mpirun, four have to do: the time is that of the processes' start.
const WORLD_SIZES: &[usize] = if cfg!(feature = "mpi") { &[4] } else { &[2, 4, 8] };
const SEED: u64 = 3;
const STEPS: usize = 50;
const BATCH: usize = 16;
const CLIP: f64 = 0.5;

fn save<T: Serialize>(folder: &Path, name: &str, value: &T) {
    std::fs::write(folder.join(name), serde_json::to_vec(value).unwrap()).unwrap();
}

fn load<T: DeserializeOwned>(folder: &Path, name: &str) -> T {
    serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))).unwrap()
}

/// Runs a test as processes, all of which must pass.
fn run(ranks: usize, test: &str) -> RankProcesses {
    let mut processes = RankProcesses::start_test(Launcher::OF_SUITE, ranks, test);
    processes.wait_until_passed(Duration::from_secs(300));
    processes
}

/// Layers of several shapes, with few tokens, many, and none on a rank.
fn parity_cases(ranks: usize) -> Vec<ParityCase> {
    let case = |(i, (hidden, ffn, experts, topk)): (usize, (usize, usize, usize, usize))| {
        [SplitAny::Even, SplitAny::MinMax, SplitAny::Random].map(|split| ParityCase {
            config: FSEPMoEConfig::new(hidden, ffn, experts).with_moe_router_topk(topk),
            slots: (experts.div_ceil(ranks) + 1 + i % 2).min(experts),
            tokens: (0..ranks).map(|rank| (rank * 7 + i * 5) % 23).collect(),
            groups: 1,
            split,
            steps: 4,
            seed: i as u64 + 1,
        })
    };
    [(8, 12, 8, 2), (16, 20, 4, 1), (7, 11, 16, 4)].into_iter().enumerate().flat_map(case).collect()
}

#[test]
#[ignore = "a rank of the test below"]
fn parity_rank() {
    rank_of_process(|comm, folder| {
        let rank = comm.rank();
        for (i, case) in parity_cases(comm.size()).iter().enumerate() {
            save(
                folder,
                &format!("case-{i}-rank-{rank}.json"),
                &case.run_rank(comm.clone(), TOKEN_TRAVEL[i % TOKEN_TRAVEL.len()])?,
            );
        }
        Ok(())
    });
}

#[test]
fn processes_compute_what_the_dense_layer_does() {
    for &ranks in WORLD_SIZES {
        let processes = run(ranks, "parity_rank");
        let mut worst = 0.0f64;
        for (i, case) in parity_cases(ranks).iter().enumerate() {
            let ranks = (0..ranks)
                .map(|rank| load::<Vec<ParityStep>>(processes.folder(), &format!("case-{i}-rank-{rank}.json")));
            worst = worst.max(case.compare(ranks.collect(), 1e-5));
        }
        println!("{ranks} processes: largest relative error {worst:.1e}");
    }
}

fn train(
    comm: std::sync::Arc<dyn burn_fsep::comm::Communicator>,
    steps: usize,
    layouts: LayoutSource,
) -> Result<Trained, FsepError> {
    let training = HandTraining { steps, batch: BATCH, clip: CLIP, layouts, sync: GradientSync::Buckets(300) };
    let runtime = FsepRuntimeConfig::new().with_seed(SEED).init(comm)?;
    train_by_hand(&runtime, &task_items(STEPS * BATCH, 1), &training)
}

const LAYOUTS: [LayoutSource; 2] = [LayoutSource::Planner(PlannerStrategy::MinMax), LayoutSource::Random];

#[test]
#[ignore = "a rank of the test below"]
fn training_rank() {
    rank_of_process(|comm, folder| {
        for (i, layouts) in LAYOUTS.into_iter().enumerate() {
            let trained = train(comm.clone(), STEPS, layouts)?;
            save(folder, &format!("losses-{i}-rank-{}.json", comm.rank()), &trained.losses);
        }
        Ok(())
    });
}

#[test]
fn processes_train_as_the_dense_model_does() {
    let dense = dense_loss_curve(SEED, STEPS, BATCH, &task_items(STEPS * BATCH, 1), CLIP);
    for &ranks in WORLD_SIZES {
        let processes = run(ranks, "training_rank");
        for (i, layouts) in LAYOUTS.iter().enumerate() {
            for rank in 0..ranks {
                let losses: Vec<f32> = load(processes.folder(), &format!("losses-{i}-rank-{rank}.json"));
                assert_eq!(losses.len(), STEPS);
                let worst = losses.iter().zip(&dense).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f32::max);
                assert!(worst <= 1e-4, "{ranks} ranks, {layouts:?}: {worst:.1e}");
                if rank == 0 {
                    println!("{ranks} processes, {layouts:?}: largest relative difference of a loss {worst:.1e}");
                }
            }
        }
    }
    assert!(small_slots(8) < 8, "experts move");
}

#[test]
#[ignore = "a rank of the test below"]
fn endless_rank() {
    rank_of_process(|comm, _| {
        loop {
            train(comm.clone(), 5, LayoutSource::Random)?;
            println!("five steps");
        }
        #[allow(unreachable_code)]
        Ok(())
    });
}

#[test]
fn the_loss_of_a_process_is_an_error_on_all_others_that_names_it() {
    for (ranks, victim) in [(2, 0), (4, 2), (4, 0)] {
        let mut processes = RankProcesses::start_test(Launcher::OF_SUITE, ranks, "endless_rank");
        (0..ranks).for_each(|rank| processes.wait_for(rank, "five steps", Duration::from_secs(120)));
        assert!(processes.kill(victim));
        let took = processes.wait(Duration::from_secs(30));
        println!("{ranks} processes: all ended {:.1} s after one was killed", took.as_secs_f64());
        for rank in (0..ranks).filter(|rank| *rank != victim) {
            let said = processes.said(rank);
            assert!(!processes.passed(rank));
            assert!(said.contains(&format!("rank {victim} ")), "rank {rank} does not name rank {victim}:\n{said}");
        }
    }
}
