//! Communication that is moved behind compute changes when things travel, never what comes out.

use std::sync::Arc;

use burn::{
    module::{Module, Param, ParamId},
    tensor::{Device, FloatDType, Tensor, TensorData},
};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig, ScheduleConfig, Timeline,
    comm::local::LaunchConfig, moe::RouterForcing,
};
use burn_fsep_planner::repair::RepairConfig;
use burn_fsep_tests::{Fault, FaultyCommunicator, device, launch, random_layout};
use rand::{Rng, SeedableRng, rngs::StdRng};

const HIDDEN: usize = 6;
const EXPERTS: usize = 6;
const SLOTS: usize = 4;
const LAYERS: usize = 4;
const TOKENS: usize = 12;

#[derive(Module, Debug)]
struct Stack {
    layers: Vec<FSEPMoE>,
}

impl Stack {
    fn new(runtime: &FsepRuntime) -> Result<Self, FsepError> {
        let config = FSEPMoEConfig::new(HIDDEN, 9, EXPERTS).with_slots_per_rank(Some(SLOTS));
        let layers = (0..LAYERS).map(|_| config.try_init(runtime, &device())).collect::<Result<_, _>>()?;
        Ok(Self { layers })
    }

    /// Applies the layers in an order; everything a training step leaves, in one list of numbers.
    fn step(&self, runtime: &FsepRuntime, order: &[usize], seed: u64) -> Result<Vec<f32>, FsepError> {
        let mut rng = StdRng::seed_from_u64(seed * 10 + runtime.rank() as u64);
        let values: Vec<f32> = (0..TOKENS * HIDDEN).map(|_| rng.random_range(-1.0..1.0)).collect();
        let x = Tensor::<2>::from_data(TensorData::new(values, [TOKENS, HIDDEN]), &device()).require_grad();
        runtime.run(|| {
            let y = order.iter().fold(x.clone(), |x, &layer| x.clone() + self.layers[layer].forward(x));
            let grads = y.clone().square().sum().backward();
            let mut left = vec![y.inner(), x.grad(&grads).expect("input gradient")];
            left.extend(self.layers.iter().filter_map(|layer| layer.experts.weight.val().grad(&grads)));
            left.into_iter().flat_map(|tensor| tensor.into_data().iter::<f32>().collect::<Vec<_>>()).collect()
        })
    }
}

/// What each rank has after each of some steps with changing layouts, and what it prefetched in vain.
fn train(
    ranks: usize,
    schedule: ScheduleConfig,
    orders: &[&[usize]],
    change: impl Fn(&mut Stack, usize) + Sync,
) -> Vec<(Vec<Vec<f32>>, u64)> {
    let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
        // Repairs wherever there is an imbalance at all: layouts change under prefetched experts.
        let eager = RepairConfig { tolerance: 1.0, ..RepairConfig::free() };
        let config = FsepRuntimeConfig::new().with_schedule(schedule).with_repair(Some(eager));
        let runtime = config.init(comm)?;
        let mut stack = Stack::new(&runtime)?;
        let mut left = Vec::new();
        for (number, order) in orders.iter().enumerate() {
            for layer in 0..LAYERS {
                let layout = random_layout(ranks, SLOTS, EXPERTS, (number * LAYERS + layer) as u64);
                runtime.set_layout(layer, Arc::new(layout))?;
            }
            runtime.begin_step(&stack)?;
            change(&mut stack, number);
            left.push(stack.step(&runtime, order, number as u64)?);
        }
        assert_eq!(runtime.unsharded_gauge().bytes(), 0, "all experts are freed after the last step");
        Ok((left, runtime.missed_prefetches()))
    });
    results.into_iter().map(Result::unwrap).collect()
}

fn values(results: Vec<(Vec<Vec<f32>>, u64)>) -> Vec<Vec<Vec<f32>>> {
    results.into_iter().map(|(values, _)| values).collect()
}

#[test]
fn every_combination_of_switches_gives_the_same_bits() {
    let orders: [&[usize]; 4] = [&[0, 1, 2, 3]; 4];
    for ranks in [2, 3] {
        let expected = values(train(ranks, ScheduleConfig::off(), &orders, |_, _| {}));
        for bits in 1..8 {
            let schedule = ScheduleConfig::new()
                .with_prefetch_forward(bits & 1 != 0)
                .with_prefetch_backward(bits & 2 != 0)
                .with_delay_reshard(bits & 4 != 0)
                .with_kept_layers([0, 1, 3, usize::MAX][bits % 4]);
            let results = train(ranks, schedule, &orders, |_, _| {});
            assert!(results.iter().all(|(_, missed)| *missed == 0), "{schedule:?}: all prefetches were used");
            assert_eq!(values(results), expected, "{ranks} ranks, {schedule:?}");
        }
    }
}

#[test]
fn a_changed_order_of_layers_is_noticed_and_gives_the_same_bits() {
    let orders: [&[usize]; 6] = [&[0, 1, 2, 3], &[0, 2, 1, 3], &[0, 2, 1, 3], &[1, 0], &[1, 1, 0, 3], &[1, 1, 0, 3]];
    let expected = values(train(2, ScheduleConfig::off(), &orders, |_, _| {}));
    let results = train(2, ScheduleConfig::new(), &orders, |_, _| {});
    // Steps 1, 3 and 4 came differently than the one before: 1 instead of 2, another first layer, 1 again instead of 0.
    assert!(results.iter().all(|(_, missed)| *missed == 3), "{:?}", results.iter().map(|r| r.1).collect::<Vec<_>>());
    assert_eq!(values(results), expected);
}

#[test]
fn parameters_that_change_after_the_step_began_are_not_computed_with_stale_values() {
    let orders: [&[usize]; 3] = [&[0, 1, 2, 3]; 3];
    let change = |stack: &mut Stack, number: usize| {
        if number == 2 {
            let experts = &mut stack.layers[2].experts;
            experts.weight =
                Param::initialized(experts.weight.id, (experts.weight.val() * 2.0).detach().require_grad());
        }
    };
    let expected = values(train(2, ScheduleConfig::off(), &orders, change));
    let results = train(2, ScheduleConfig::new(), &orders, change);
    assert!(results.iter().all(|(_, missed)| *missed == 1));
    assert_eq!(values(results), expected);
    let unchanged = values(train(2, ScheduleConfig::off(), &orders, |_, _| {}));
    assert_ne!(unchanged, expected, "the change matters");
}

/// A stack beside a matrix that nobody has needed yet.
#[derive(Module, Debug)]
struct WithLazyMatrix {
    lazy: Param<Tensor<2>>,
    stack: Stack,
}

#[test]
fn the_begin_of_a_step_touches_no_parameters_but_experts() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let make = |device: &Device, _| Tensor::<2>::zeros([4, 4], device);
        let lazy = Param::uninitialized(ParamId::new(), make, device(), true, [4, 4].into());
        let model = WithLazyMatrix { lazy, stack: Stack::new(&runtime)? };
        for step in 0..3 {
            runtime.begin_step(&model)?;
            model.stack.step(&runtime, &[0, 1, 2, 3], step)?;
        }
        Ok((model.lazy.is_initialized(), runtime.missed_prefetches()))
    });
    for result in results {
        assert_eq!(result.unwrap(), (false, 0));
    }
}

#[test]
fn at_most_two_layers_of_experts_are_alive() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let stack = Stack::new(&runtime)?;
        for step in 0..3 {
            runtime.begin_step(&stack)?;
            stack.step(&runtime, &[0, 1, 2, 3], step)?;
        }
        Ok(runtime.unsharded_gauge().peak_bytes())
    });
    let one_layer = SLOTS * 3 * HIDDEN * 9 * size_of::<f32>();
    for peak in results.into_iter().map(Result::unwrap) {
        assert_eq!(peak, 2 * one_layer, "this layer's experts, and the next one's");
    }
}

#[test]
fn the_timeline_names_layers_and_waits() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let timeline = Timeline::new();
        let runtime = FsepRuntimeConfig::new().with_timeline(timeline.clone()).init(comm)?;
        Stack::new(&runtime)?.step(&runtime, &[0, 1, 2, 3], 0)?;
        timeline.records()
    });
    for records in results.into_iter().map(Result::unwrap) {
        for layer in 0..LAYERS {
            let count = |name: &str| {
                let name = format!("{name}, layer {layer}");
                records.iter().filter(|record| record.name == name).count()
            };
            let names = ["experts in forward", "experts in backward", "routing counts"];
            assert_eq!(names.map(count), [1, 1, 1]);
        }
    }
}

#[test]
fn experts_compute_in_bf16_while_parameters_stay_f32() {
    for ranks in [1, 2] {
        let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
            let runtime = FsepRuntime::new(comm)?;
            // Forced, since near ties are decided by rounding.
            let config = FSEPMoEConfig::new(16, 24, 4).with_moe_router_force(Some(RouterForcing::LoadBalancing));
            let mut plain = config.try_init(&runtime, &device())?;
            let mixed = config.with_compute_dtype(Some(FloatDType::BF16)).try_init(&runtime, &device())?;
            // Layers draw values of their own: the plain one gets the mixed one's.
            plain.router.weight = Param::initialized(plain.router.weight.id, mixed.router.weight.val().detach());
            plain.experts.weight =
                Param::initialized(plain.experts.weight.id, mixed.experts.weight.val().detach().require_grad());
            let mut rng = StdRng::seed_from_u64(runtime.rank() as u64);
            let values: Vec<f32> = (0..20 * 16).map(|_| rng.random_range(-1.0..1.0)).collect();
            let x = Tensor::<2>::from_data(TensorData::new(values, [20, 16]), &device());
            runtime.run(|| {
                let gradient = |layer: &FSEPMoE, x: Tensor<2>| {
                    let grads = layer.forward(x).cast(FloatDType::F32).square().sum().backward();
                    layer.experts.weight.val().grad(&grads).expect("experts' gradient").into_data()
                };
                (gradient(&mixed, x.clone().cast(FloatDType::BF16)), gradient(&plain, x))
            })
        });
        for (mixed, plain) in results.into_iter().map(Result::unwrap) {
            assert_eq!(mixed.dtype(), FloatDType::F32.into());
            let error = burn_fsep_tests::relative_error(&mixed, &plain);
            assert!(error > 1e-5 && error < 2e-2, "{ranks} ranks: {error:e}");
        }
    }
}

#[test]
fn a_rank_that_begins_a_step_alone_is_noticed() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<(), FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let stack = Stack::new(&runtime)?;
        for step in 0..2 {
            // In the first step nothing is known of the order of layers, so nothing is prefetched.
            if runtime.rank() == 0 || step == 0 {
                runtime.begin_step(&stack)?;
            }
            stack.step(&runtime, &[0, 1, 2, 3], step)?;
        }
        Ok(())
    });
    let errors: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert!(errors.iter().any(|error| error.contains("is begin_step called on all ranks?")), "{errors:?}");
}

/// What two optimizer steps of three batches each leave, and what a rank has sent to restore experts.
fn accumulate(kept_layers: usize, change_layouts: bool, tell: bool) -> Vec<(Vec<Vec<f32>>, usize)> {
    let results = launch(&LaunchConfig::new(3), |comm| -> Result<_, FsepError> {
        let (comm, record) = FaultyCommunicator::new(comm, Fault::None);
        let schedule = ScheduleConfig::new().with_kept_layers(kept_layers);
        let runtime = FsepRuntimeConfig::new().with_schedule(schedule).with_repair(None).init(comm)?;
        let mut stack = Stack::new(&runtime)?;
        let mut left = Vec::new();
        for number in 0..9 {
            for layer in 0..LAYERS {
                let seed = if change_layouts { number * LAYERS + layer } else { layer };
                runtime.set_layout(layer, Arc::new(random_layout(3, SLOTS, EXPERTS, seed as u64)))?;
            }
            if number == 3 {
                // Until then ranks learn the order of layers.
                record.sent.lock().unwrap().clear();
            }
            match tell && number % 3 < 2 {
                true => runtime.begin_micro_batch(&stack)?,
                false => runtime.begin_step(&stack)?,
            }
            left.push(stack.step(&runtime, &[0, 1, 2, 3], number as u64)?);
            if number % 3 == 2 {
                for layer in &mut stack.layers {
                    let id = layer.experts.weight.id;
                    let weight = layer.experts.weight.val() * 0.75;
                    layer.experts.weight = Param::initialized(id, weight.detach().require_grad());
                }
                assert_eq!(runtime.unsharded_gauge().bytes(), 0, "all experts are freed for the optimizer");
            }
        }
        assert_eq!(runtime.missed_prefetches(), 0);
        let sent = record.sent.lock().unwrap();
        let restored = sent.iter().filter(|(name, _)| name.contains("unshard") || name.contains("repair"));
        Ok((left, restored.map(|(_, bytes)| bytes).sum()))
    });
    results.into_iter().map(Result::unwrap).collect()
}

#[test]
fn experts_stay_for_the_batches_of_one_optimizer_step() {
    for change_layouts in [false, true] {
        let expected = accumulate(0, change_layouts, false);
        for kept_layers in [1, 2, usize::MAX] {
            let (told, untold) =
                (accumulate(kept_layers, change_layouts, true), accumulate(kept_layers, change_layouts, false));
            for ((told, untold), expected) in told.iter().zip(&untold).zip(&expected) {
                assert_eq!(told.0, expected.0, "{kept_layers} layers kept");
                assert!(told.1 < untold.1 && untold.1 < expected.1, "{} {} {}", told.1, untold.1, expected.1);
                if kept_layers == usize::MAX && !change_layouts {
                    // Of each three batches only the first restores, and only for forward.
                    assert_eq!((told.1 * 3, untold.1 * 2), (untold.1, expected.1));
                }
            }
        }
    }
}
