//! FSEP inside groups, data parallel across them: values, gradients, losses, norms and checkpoints are those of the dense model, whatever
//! the groups.

use std::{path::Path, time::Duration};

use burn::data::dataloader::batcher::Batcher;
use burn::{
    module::{Module, ParamGroup},
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer, MuonConfig},
    tensor::{Tensor, TensorData},
};
use burn_fsep::{
    ExpertParallelism, FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    checkpoint::{CheckpointConfig, list, load},
    comm::local::LaunchConfig,
    moe::{ExpertBiasConfig, SharedExpertConfig, TopKRouterConfig},
    train::{
        PlannerConfig, ShardedOptimizer, TrainOptimizer, TrainerConfig, broadcast_parameters, check_replicas,
        sync_gradients,
    },
};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{
    GradientSync, HandTraining, LayoutSource, ParityCase, SmallMoe, SplitAny, TOKEN_TRAVEL, TaskBatcher, TaskItem,
    Trained, check_parity_of, dense_loss_curve, device, launch, launch_runtimes, small_slots, task_items,
    train_by_hand,
};

const SEED: u64 = 3;
const BATCH: usize = 16;
const CLIP: f64 = 0.5;

/// World sizes, and ranks that share the experts.
const GROUPS: [(usize, usize); 6] = [(2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4)];

fn on_ranks<T: Send>(
    (world, shared_by): (usize, usize),
    program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync,
) -> Vec<T> {
    let launched = LaunchConfig::new(world).with_timeout(Duration::from_secs(60));
    let config = FsepRuntimeConfig::new().with_seed(SEED).with_expert_parallel_size(shared_by);
    launch_runtimes(&launched, &config, program)
}

#[test]
fn every_value_and_gradient_is_that_of_the_dense_layer() {
    let config = || FSEPMoEConfig::new(6, 7, 8).with_moe_router_topk(2);
    let router = TopKRouterConfig::new().with_expert_bias(Some(ExpertBiasConfig::new()));
    let configs = [
        config().with_moe_aux_loss_coeff(0.1).with_moe_z_loss_coeff(0.05),
        config().with_expert_parallelism(ExpertParallelism::Static).with_moe_aux_loss_coeff(0.1),
        config().with_shared_expert(Some(SharedExpertConfig::new(5))).with_router(router),
    ];
    let (mut worst, mut cases) = (0.0f64, 0);
    for (world, shared_by) in GROUPS {
        for tokens in [vec![9; world], (0..world).map(|rank| 3 * rank).collect::<Vec<_>>()] {
            for config in &configs {
                let is_static = config.expert_parallelism == ExpertParallelism::Static;
                let slots = if is_static { 8 / shared_by } else { small_slots(shared_by) };
                let (config, tokens, groups) = (config.clone(), tokens.clone(), world / shared_by);
                let case =
                    ParityCase { config, slots, tokens, groups, split: SplitAny::MinMax, steps: 2, seed: 40 + cases };
                let travel = TOKEN_TRAVEL[cases as usize % TOKEN_TRAVEL.len()];
                worst = worst.max(check_parity_of(&case, travel, 1e-5, |comm| comm));
                cases += 1;
            }
        }
    }
    println!("{cases} cases: largest relative error {worst:.2e}");
}

#[test]
fn large_shards_are_averaged_over_many_replicas_whatever_the_order_of_collection() {
    // So large that a mean takes two exchanges.
    let config = FSEPMoEConfig::new(32, 96, 8).with_moe_router_topk(2);
    for (world, shared_by) in [(3, 1), (6, 2)] {
        let (config, slots) = (config.clone(), small_slots(shared_by));
        let (tokens, groups) = (vec![9; world], world / shared_by);
        let case = ParityCase { config, slots, tokens, groups, split: SplitAny::MinMax, steps: 2, seed: 8 };
        check_parity_of(&case, TOKEN_TRAVEL[0], 1e-5, |comm| comm);
    }
    // Each rank leaves out another layer, so that its graph is another one.
    let gradients = on_ranks((3, 1), |runtime| {
        let layers: Vec<FSEPMoE> = (0..3).map(|_| config.try_init(runtime, &device())).collect::<Result<_, _>>()?;
        let x = Tensor::<2>::ones([5, 32], &device());
        runtime.run(|| {
            let outputs: Vec<_> = layers.iter().map(|layer| layer.forward(x.clone())).collect();
            let used = outputs.into_iter().enumerate().filter(|(layer, _)| *layer != runtime.rank());
            let loss = used.map(|(_, output)| output.square().sum()).reduce(|a, b| a * 0.5 + b).unwrap();
            let grads = runtime.connect(loss).backward();
            let gradient = |layer: &FSEPMoE| layer.experts.weight.val().grad(&grads).unwrap().into_data();
            layers.iter().map(gradient).collect::<Vec<_>>()
        })
    });
    assert!(gradients[0].iter().all(|layer| layer.iter::<f32>().any(|value| value != 0.0)));
    assert!(gradients.iter().all(|theirs| *theirs == gradients[0]), "all ranks have the same means");
}

#[test]
fn groups_that_want_other_gradients_are_told() {
    let launched = LaunchConfig::new(4).with_timeout(Duration::from_secs(20));
    let results = launch(&launched, |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntimeConfig::new().with_expert_parallel_size(2).init(comm)?;
        let mut layer = FSEPMoEConfig::new(4, 6, 8).try_init(&runtime, &device())?;
        if runtime.rank() >= 2 {
            layer.experts = layer.experts.no_grad();
        }
        let x = Tensor::<2>::ones([3, 4], &device());
        runtime.run(|| drop(layer.forward(x).sum().backward()))
    });
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("the wanted gradients") || error.contains("gradients wanted"), "{error}");
    }
}

fn train(groups: (usize, usize), steps: usize, layouts: LayoutSource, sync: GradientSync) -> Vec<Trained> {
    let items = task_items(steps * BATCH, 1);
    let training = HandTraining { steps, batch: BATCH, clip: CLIP, layouts, sync };
    on_ranks(groups, |runtime| train_by_hand(runtime, &items, &training))
}

fn largest_error(losses: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(losses.len(), expected.len());
    losses.iter().zip(expected).map(|(ours, expected)| ((ours - expected) / expected).abs()).fold(0.0, f32::max)
}

#[test]
fn the_loss_curve_and_the_norm_are_those_of_the_dense_model() {
    const STEPS: usize = 200;
    let dense = dense_loss_curve(SEED, STEPS, BATCH, &task_items(STEPS * BATCH, 1), CLIP);
    let planner = LayoutSource::Planner(PlannerStrategy::MinMax);
    let whole = train((4, 4), STEPS, planner, GradientSync::AfterBackward).swap_remove(0);
    for (groups, layouts, sync) in [
        ((4, 1), planner, GradientSync::AfterBackward),
        ((4, 2), planner, GradientSync::Buckets(300)),
        ((8, 2), LayoutSource::Random, GradientSync::AfterBackward),
        ((8, 4), planner, GradientSync::Buckets(1)),
    ] {
        let results = train(groups, STEPS, layouts, sync);
        for result in &results {
            let error = largest_error(&result.losses, &dense);
            assert!(error <= 1e-4, "{groups:?}, {layouts:?}: {error:.2e}");
            assert_eq!(result.replicated, results[0].replicated, "{groups:?}: replicated parameters differ");
            let norm = (result.largest_norm / whole.largest_norm - 1.0).abs();
            assert!(norm <= 1e-6 && result.largest_norm > CLIP, "{groups:?}: norm {norm:.2e}");
        }
        println!("{groups:?}: largest error {:.2e}", largest_error(&results[0].losses, &dense));
    }
}

#[test]
fn training_again_gives_the_same_bits() {
    let run = || train((8, 2), 12, LayoutSource::Planner(PlannerStrategy::MinMax), GradientSync::Buckets(300));
    for (first, second) in run().iter().zip(run()) {
        assert_eq!((&first.losses, &first.replicated), (&second.losses, &second.replicated));
    }
}

/// Ranks, those that share the experts, and whether optimizer state is cut.
type Job = (usize, usize, bool);

/// A job's ranks train from the newest checkpoint of a folder, if there is one, saving one every 6 steps.
fn run(job: Job, folder: &Path, items: &[TaskItem], until: u64) -> Vec<(Vec<f64>, Vec<u32>)> {
    let (world, shared_by, is_cut) = job;
    on_ranks((world, shared_by), |runtime| {
        let model = SmallMoe::fsep(runtime, small_slots(shared_by), &device())?;
        let optimizer = AdamWConfig::new().with_epsilon(1e-6).init();
        match is_cut {
            true => {
                let optimizer = ShardedOptimizer::new(runtime, optimizer, &model)?;
                go_on(runtime, model, optimizer, folder, items, until)
            }
            false => go_on(runtime, model, optimizer, folder, items, until),
        }
    })
}

/// The losses of a rank's steps, and the first layer's layout of its group at the end.
fn go_on<O: TrainOptimizer>(
    runtime: &FsepRuntime,
    mut model: SmallMoe,
    mut optimizer: O,
    folder: &Path,
    items: &[TaskItem],
    until: u64,
) -> Result<(Vec<f64>, Vec<u32>), FsepError> {
    let planner = PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true);
    let checkpoints = CheckpointConfig::new(folder).with_every(6);
    let mut config = TrainerConfig::new().with_max_grad_norm(CLIP).with_planner(planner).with_checkpoints(checkpoints);
    if let Some(newest) = list(folder).unwrap_or_default().first() {
        let loaded = load(newest, runtime, &model, &optimizer)?;
        (model, optimizer) = (loaded.model, loaded.optimizer);
        config = config.with_start(loaded.progress);
    }
    let mut trainer = config.init(runtime, model, optimizer)?;
    let share = BATCH / runtime.world_size();
    let mut losses = Vec::new();
    for step in trainer.progress().step..until {
        let start = step as usize * BATCH + runtime.rank() * share;
        let batch = TaskBatcher.batch(items[start..start + share].to_vec(), &device());
        let done = trainer.step(1e-2, |model| model.loss(&batch))?;
        losses.push(trainer.mean_loss(&done)?);
    }
    trainer.finish()?;
    Ok((losses, runtime.layout(0).as_slice().to_vec()))
}

#[test]
fn checkpoints_are_of_any_groups() {
    const SAVED: u64 = 6;
    const UNTIL: u64 = SAVED + 20;
    let items = task_items(UNTIL as usize * BATCH, 5);
    for from in [(8, 2, true), (4, 4, false), (4, 2, false), (1, 1, false)] {
        let folder = tempfile::tempdir().unwrap();
        run(from, folder.path(), &items, SAVED);
        let saved = list(folder.path()).unwrap().swap_remove(0);
        let expected = {
            // The whole way at once, in a folder of its own.
            let other = tempfile::tempdir().unwrap();
            run(from, other.path(), &items, UNTIL)
        };
        if from == (8, 2, true) {
            let layouts: std::collections::BTreeSet<_> = expected.iter().map(|(_, layout)| layout).collect();
            assert!(layouts.len() > 1, "all groups have one layout: nothing is told apart");
        }
        for to in [(8, 2, true), (8, 2, false), (8, 8, false), (4, 1, true), (2, 2, true), (1, 1, false)] {
            let copy = tempfile::tempdir().unwrap();
            let target = copy.path().join(saved.file_name().unwrap());
            std::fs::create_dir(&target).unwrap();
            for file in std::fs::read_dir(&saved).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), target.join(file.file_name())).unwrap();
            }
            let resumed = run(to, copy.path(), &items, UNTIL);
            for (rank, (losses, layout)) in resumed.iter().enumerate() {
                let whole = &expected[rank % expected.len()];
                let rest = &whole.0[SAVED as usize..];
                // Steps are the same whether their state is cut or not.
                if (from.0, from.1) == (to.0, to.1) {
                    assert_eq!((losses.as_slice(), layout), (rest, &whole.1), "{from:?}, rank {rank}");
                }
                let error = losses.iter().zip(rest).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max);
                assert!(losses.len() == 20 && error <= 1e-5, "{from:?} to {to:?}: {error:.2e}");
            }
        }
    }
}

#[test]
fn groups_have_the_first_ones_shards_and_are_found_out_where_they_differ() {
    let layer = |runtime: &FsepRuntime, wrong: Option<usize>| -> Result<FSEPMoE, FsepError> {
        let mut layer = FSEPMoEConfig::new(4, 6, 8).try_init(runtime, &device())?;
        if wrong.is_none_or(|wrong| wrong == runtime.rank()) {
            let scale = 1.0 + 0.125 * runtime.rank() as f64;
            layer.experts.weight = layer.experts.weight.map(|weight| (weight * scale).detach().require_grad());
        }
        Ok(layer)
    };
    on_ranks((4, 2), |runtime| {
        // All are different, and rank 0's and rank 1's are right.
        let model = broadcast_parameters(runtime, layer(runtime, None)?)?;
        check_replicas(runtime, &model)?;
        let own = model.experts.weight.val().inner().into_data();
        let mut first = own.clone().into_bytes();
        runtime.groups().replicas().broadcast(burn_fsep::comm::Operation::new("test"), &mut first, 0).unwrap();
        assert_eq!(TensorData::from_bytes(first, own.shape(), own.dtype()), own);
        // Rank 3 has what rank 1 has not.
        let error = check_replicas(runtime, &layer(runtime, Some(3))?).unwrap_err();
        match error {
            FsepError::ReplicasDiffer { parameter, ranks, .. } => {
                assert_eq!((parameter.as_str(), ranks.as_slice()), ("experts.weight", &[3][..]));
            }
            other => panic!("{other}"),
        }
        Ok(())
    });
}

#[test]
fn a_rank_keeps_its_part_of_the_state_of_experts_that_other_groups_have_too() {
    let state_bytes = |groups| {
        let all = on_ranks(groups, |runtime| {
            let layer = FSEPMoEConfig::new(16, 32, 8).with_slots_per_rank(Some(8)).try_init(runtime, &device())?;
            let mut optimizer = ShardedOptimizer::new(runtime, AdamWConfig::new().init(), &layer)?;
            let x = Tensor::<2>::ones([6, 16], &device());
            let mut grads = runtime.run(|| GradientsParams::from_grads(layer.forward(x).sum().backward(), &layer))?;
            sync_gradients(runtime, &layer, &mut grads)?;
            optimizer.step(1e-3, layer, grads)?;
            optimizer.state_bytes()
        });
        all.into_iter().max().unwrap()
    };
    let whole = state_bytes((1, 1));
    for groups in [(8, 8), (8, 2), (8, 1), (4, 2)] {
        let share = state_bytes(groups) as f64 / whole as f64 * groups.0 as f64;
        println!("{groups:?}: {share:.4} of 1 / {}", groups.0);
        assert!((1.0..1.01).contains(&share), "{groups:?}: {share}");
    }
}

#[test]
fn optimizers_that_look_at_matrices_are_refused_for_shards() {
    on_ranks((2, 2), |runtime| {
        let layer = FSEPMoEConfig::new(4, 6, 8).try_init(runtime, &device())?;
        let optimizer = ModuleOptimizer::from(AdamWConfig::new().build());
        let muon = optimizer.with_group(ParamGroup::from_path("experts.weight"), MuonConfig::new().build(), None);
        match TrainerConfig::new().init(runtime, layer, muon).err() {
            Some(FsepError::ExpertOptimizer { parameter, .. }) => assert_eq!(parameter, "experts.weight"),
            other => panic!("{other:?}"),
        }
        Ok(())
    });
}

#[test]
fn loads_of_experts_are_those_of_all_groups() {
    let loads = on_ranks((4, 2), |runtime| {
        let experts = FSEPMoEConfig::new(4, 6, 8).with_slots_per_rank(Some(5));
        let layer = experts.try_init(runtime, &device())?;
        let tokens = Tensor::<2>::ones([2 + runtime.rank(), 4], &device()) * (runtime.rank() as f64 - 1.5);
        let output = runtime.run(|| layer.forward_with_losses(tokens))?;
        Ok((output.routing.expert_loads, output.routing.ranks))
    });
    for (loads_of_rank, ranks) in &loads {
        assert_eq!(loads_of_rank, &loads[0].0);
        assert_eq!((loads_of_rank.iter().sum::<u64>(), *ranks), (2 * (2 + 3 + 4 + 5), 4));
    }
}

#[test]
fn groups_that_cannot_be_are_refused() {
    for (shared_by, other) in [(3, 3), (0, 0), (8, 8), (2, 4)] {
        let results = launch(&LaunchConfig::new(4), |comm| {
            let shared_by = if comm.rank() == 3 { other } else { shared_by };
            FsepRuntimeConfig::new().with_expert_parallel_size(shared_by).init(comm).map(drop)
        });
        for result in results {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("expert"), "{error}");
        }
    }
}
