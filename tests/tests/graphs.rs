//! Ways to use the layer that change the autodiff graph: branches, reuse, checkpointing, views, inference.

use std::{sync::Arc, time::Duration};

use burn::{
    module::{Module, Param},
    optim::GradientsParams,
    tensor::{Device, Tensor, TensorData},
};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    comm::{
        CommError, Communicator,
        local::{LaunchConfig, RankError},
    },
    moe::RouterForcing,
    train::sync_gradients,
};
use burn_fsep_tests::{assert_close, device, launch, plain_device};

const HIDDEN: usize = 4;

fn ranks<T: Send>(n: usize, program: impl Fn(Arc<dyn Communicator>) -> Result<T, FsepError> + Sync) -> Vec<T> {
    let results = launch(&LaunchConfig::new(n).with_timeout(Duration::from_secs(20)), program);
    results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
}

fn config() -> FSEPMoEConfig {
    FSEPMoEConfig::new(HIDDEN, 6, 4).with_slots_per_rank(Some(3))
}

/// Rows that differ between ranks.
fn input(rank: usize, tokens: usize, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = (0..tokens * HIDDEN).map(|i| ((i + 31 * rank) as f32 * 0.7).sin()).collect();
    Tensor::from_data(TensorData::new(values, [tokens, HIDDEN]), device)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Losses of two layers, as one wants them to be on each rank.
type Program = fn(&FSEPMoE, &FSEPMoE, Tensor<2>, f32) -> Tensor<1>;

/// Gradients of router and experts of both layers on every rank. `weight` is 0 on rank 1 and 1 elsewhere.
fn gradients(connect: bool, program: Program) -> Vec<Vec<f32>> {
    ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let (a, b) = (config().try_init(&runtime, &device())?, config().try_init(&runtime, &device())?);
        runtime.run(|| {
            let weight = if runtime.rank() == 1 { 0.0 } else { 1.0 };
            let loss = program(&a, &b, input(runtime.rank(), 5, &device()), weight);
            let loss = if connect { runtime.connect(loss) } else { loss };
            let grads = loss.backward();
            let mut all = Vec::new();
            for layer in [&a, &b] {
                all.extend(floats(layer.experts.weight.val().grad(&grads).expect("experts' gradient")));
                all.extend(floats(layer.router.weight.val().grad(&grads).expect("router's gradient")));
            }
            all
        })
    })
}

/// `program` leaves out on rank 1 what `reference` multiplies by 0.
fn leaves_out(program: Program, reference: Program) {
    let (actual, expected) = (gradients(true, program), gradients(false, reference));
    for (actual, expected) in actual.iter().zip(&expected) {
        let data = |values: &[f32]| TensorData::new(values.to_vec(), [values.len()]);
        assert_close("gradients", &data(actual), &data(expected), 1e-6);
    }
    assert!(actual[0].iter().any(|&g| g != 0.0));
}

#[test]
fn a_branch_that_one_rank_does_not_use() {
    for first in [true, false] {
        let (program, reference): (Program, Program) = if first {
            (
                |a, b, x, w| {
                    let (a, b) = (a.forward(x.clone()), b.forward(x));
                    if w == 0.0 { b.square().sum() } else { (a + b).square().sum() }
                },
                |a, b, x, w| (a.forward(x.clone()) * w + b.forward(x)).square().sum(),
            )
        } else {
            (
                |a, b, x, w| {
                    let (a, b) = (a.forward(x.clone()), b.forward(x));
                    if w == 0.0 { a.square().sum() } else { (a + b).square().sum() }
                },
                |a, b, x, w| (a.forward(x.clone()) + b.forward(x) * w).square().sum(),
            )
        };
        leaves_out(program, reference);
    }
}

#[test]
fn branches_of_different_depth() {
    // Rank 1 adds the branches in another order and with more operations in between.
    leaves_out(
        |a, b, x, w| {
            let (a, b) = (a.forward(x.clone()), b.forward(x));
            if w == 0.0 {
                let deep = (0..5).fold(a, |a, _| a * 1.0);
                (b + deep).square().sum()
            } else {
                (a + b).square().sum()
            }
        },
        |a, b, x, _| (a.forward(x.clone()) + b.forward(x)).square().sum(),
    );
}

#[test]
fn branches_in_another_order_on_one_rank_are_right_or_a_clear_error() {
    // Without `connect` nothing makes the graphs equal, and backward follows the graph.
    let start = std::time::Instant::now();
    let gradients = |reorder: bool| {
        launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(20)), |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let (a, b) = (config().try_init(&runtime, &device())?, config().try_init(&runtime, &device())?);
            runtime.run(|| {
                let x = input(runtime.rank(), 5, &device());
                let (first, second) = (a.forward(x.clone()), b.forward(x));
                let reorder = reorder && runtime.rank() == 1;
                let sum = if reorder { second + (0..5).fold(first, |x, _| x * 1.0) } else { first + second };
                let grads = sum.square().sum().backward();
                [&a, &b].map(|layer| floats(layer.experts.weight.val().grad(&grads).expect("gradient"))).concat()
            })
        })
    };
    let expected = gradients(false);
    same_or_mismatch(gradients(true), expected);
    assert!(start.elapsed() < Duration::from_secs(15));
}

/// A gradient of each rank.
type Gradients = Vec<Result<Vec<f32>, RankError<FsepError>>>;

/// Each rank has the expected gradient, or all were told that they disagree.
fn same_or_mismatch(actual: Gradients, expected: Gradients) {
    let data = |values: &[f32]| TensorData::new(values.to_vec(), [values.len()]);
    for (actual, expected) in actual.into_iter().zip(expected) {
        match actual {
            Ok(actual) => {
                assert_close("gradient", &data(&actual), &data(&expected.unwrap()), 1e-5);
            }
            Err(RankError::Failed { error: FsepError::Comm(CommError::Mismatch { .. }), .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn uses_of_one_layer_in_another_order_on_one_rank_are_right_or_a_clear_error() {
    // Both uses send equally many tokens everywhere: only their numbers tell them apart.
    let config = config().with_moe_router_force(Some(RouterForcing::LoadBalancing));
    let gradients = |reorder: bool| {
        launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(20)), |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let layer = config.try_init(&runtime, &device())?;
            runtime.run(|| {
                let x = input(runtime.rank(), 4, &device()).require_grad();
                let longer = (0..5).fold(x.clone(), |x, _| x * 1.0);
                let reorder = reorder && runtime.rank() == 1;
                let (first, second) = if reorder { (longer, x) } else { (x, longer) };
                let sum = layer.forward(first) + layer.forward(second * 0.5);
                floats(layer.experts.weight.val().grad(&sum.square().sum().backward()).expect("gradient"))
            })
        })
    };
    let expected = gradients(false);
    same_or_mismatch(gradients(true), expected);
}

#[test]
fn an_earlier_use_of_a_layer_is_not_connected_and_a_clear_error() {
    let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(20)), |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let layer = config().try_init(&runtime, &device())?;
        runtime.run(|| {
            let x = input(runtime.rank(), 4, &device());
            let (first, second) = (layer.forward(x.clone()), layer.forward(x * 0.5));
            let loss = if runtime.rank() == 1 { second.sum() } else { (first + second).sum() };
            drop(runtime.connect(loss).backward());
        })
    });
    let error = results[0].as_ref().unwrap_err().to_string();
    assert!(error.contains("rank 1") && error.contains("of layer 0 (pass"), "{error}");
}

#[test]
fn no_rank_uses_a_layer() {
    leaves_out(
        |a, b, x, _| {
            let _ = b.forward(x.clone());
            a.forward(x).square().sum()
        },
        |a, b, x, _| (b.forward(x.clone()) * 0.0).sum() + a.forward(x).square().sum(),
    );
}

#[test]
fn a_layer_used_twice_in_a_step() {
    leaves_out(
        |a, b, x, w| {
            let hidden = a.forward(x.clone());
            let again = a.forward(hidden.clone());
            let last = b.forward(hidden.clone());
            if w == 0.0 { (hidden + last).square().sum() } else { (hidden + again + last).square().sum() }
        },
        |a, b, x, w| {
            let hidden = a.forward(x.clone());
            let again = a.forward(hidden.clone());
            let last = b.forward(hidden.clone());
            (hidden + again * w + last).square().sum()
        },
    );
}

#[test]
fn a_loss_that_is_not_finite_stays_the_ranks_own() {
    // `connect` adds nothing to the loss, whatever the unused output is.
    let losses = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let layer = config().try_init(&runtime, &device())?;
        runtime.run(|| {
            let output = layer.forward(input(0, 3, &device()) * 1e30);
            drop(output);
            runtime.connect(Tensor::<1>::ones([1], &device())).into_scalar::<f32>()
        })
    });
    assert_eq!(losses, [1.0, 1.0]);
}

/// Output, input gradient and experts' gradient of each rank.
fn step_with(device: &Device, forward: fn(&FSEPMoE, Tensor<2>) -> Tensor<2>) -> Vec<[Vec<f32>; 3]> {
    ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let layer = config().try_init(&runtime, device)?;
        let x = input(runtime.rank(), 6, device).require_grad();
        runtime.run(|| {
            let output = forward(&layer, x.clone());
            let grads = output.clone().square().sum().backward();
            let experts = layer.experts.weight.val().grad(&grads).unwrap();
            [floats(output), floats(x.grad(&grads).unwrap()), floats(experts)]
        })
    })
}

#[test]
fn gradient_checkpointing_changes_nothing() {
    let plain = step_with(&device(), |layer, x| layer.forward(x.exp().log()).tanh());
    let checkpointed = step_with(&device().gradient_checkpointing(), |layer, x| layer.forward(x.exp().log()).tanh());
    // log(exp(x)) is recomputed to the same bits.
    assert_eq!(plain, checkpointed);
}

#[test]
fn inputs_of_more_dimensions_and_views_are_the_same_tokens() {
    let plain = step_with(&device(), |layer, x| layer.forward(x));
    let batched = |layer: &FSEPMoE, x: Tensor<2>| layer.forward(x.reshape([2, 3, HIDDEN])).reshape([6, HIDDEN]);
    assert_eq!(plain, step_with(&device(), batched));
    // Strided: the transpose of a contiguous transpose.
    let strided = |layer: &FSEPMoE, x: Tensor<2>| {
        let turned = Tensor::<2>::from_data(x.clone().inner().transpose().into_data(), &x.device());
        layer.forward(turned.transpose() - x.clone().detach() + x)
    };
    let strided = step_with(&device(), strided);
    for (actual, expected) in strided.iter().zip(&plain) {
        for (actual, expected) in actual.iter().zip(expected) {
            let data = |values: &[f32]| TensorData::new(values.to_vec(), [values.len()]);
            assert_close("strided input", &data(actual), &data(expected), 1e-6);
        }
    }
    let sliced = |layer: &FSEPMoE, x: Tensor<2>| {
        let wide = Tensor::cat(vec![x.clone(), x.clone().detach(), x.detach()], 1);
        layer.forward(wide.slice([0..6, 0..HIDDEN]))
    };
    assert_eq!(plain, step_with(&device(), sliced));
}

#[test]
fn inference_is_the_forward_of_training() {
    let outputs = ranks(3, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let layer = config().try_init(&runtime, &device())?;
        let rank = runtime.rank();
        // The last rank has no tokens.
        let trained = layer.try_forward(input(rank, 4 - 2 * rank, &device()))?.hidden;
        let counted = runtime.stats();
        let inferred = layer.valid().try_forward(input(rank, 4 - 2 * rank, &plain_device()))?.hidden;
        assert!(!inferred.is_tracked());
        assert_eq!(counted, runtime.stats(), "inference is not counted as training");
        Ok((floats(trained), floats(inferred)))
    });
    for (trained, inferred) in outputs {
        // Not bit for bit: Burn works in place on tensors that nobody keeps for backward.
        let data = |values: Vec<f32>| TensorData::new(values.clone(), [values.len()]);
        assert_close("inference", &data(inferred), &data(trained), 1e-6);
    }
}

#[test]
fn recomputed_layers_count_their_tokens_once() {
    let checkpointed = device().gradient_checkpointing();
    for recompute in [false, true] {
        let totals = ranks(2, |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let layer = config().with_moe_layer_recompute(recompute).try_init(&runtime, &checkpointed)?;
            runtime.run(|| layer.forward(input(runtime.rank(), 5, &checkpointed).exp()).sum().backward())?;
            Ok(runtime.stats().layers[0].counts.total())
        });
        assert_eq!(totals, [20, 20], "2 ranks x 5 tokens x top-2");
    }
}

/// Two parameters, each used by the loss of one rank only, and a frozen one.
#[derive(Module, Debug)]
struct Partly {
    first: Param<Tensor<1>>,
    second: Param<Tensor<1>>,
    frozen: Param<Tensor<1>>,
}

#[test]
fn parameters_that_one_rank_does_not_use_get_the_mean_gradient() {
    let synced = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let param = |values: [f32; 2]| Param::from_data(TensorData::from(values), &device());
        let model = Partly { first: param([1.0, 2.0]), second: param([3.0, 4.0]), frozen: param([5.0, 6.0]).no_grad() };
        let used = if runtime.rank() == 0 { &model.first } else { &model.second };
        let loss = (used.val() * model.frozen.val()).sum();
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        sync_gradients(&runtime, &model, &mut grads)?;
        assert!(grads.get::<1>(model.frozen.id).is_none());
        Ok([&model.first, &model.second].map(|param| floats(grads.get::<1>(param.id).expect("a mean"))))
    });
    assert_eq!(synced, [[vec![2.5, 3.0], vec![2.5, 3.0]], [vec![2.5, 3.0], vec![2.5, 3.0]]]);
}
