//! Every rank runs the same collectives: without tokens, with frozen parameters, with outputs that are not used.

use std::{fmt::Debug, sync::Arc, time::Duration};

use burn::{
    module::{Lora, Module, Param, ParamGroup},
    store::ModuleRecord,
    tensor::{DType, FloatDType, Tensor, TensorData},
};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    comm::{
        CommError, Communicator, Operation,
        local::{LaunchConfig, LocalCommunicator, RankError},
    },
    moe::{MoeOutput, RouterForcing},
};
use burn_fsep_tests::{device, launch};

const HIDDEN: usize = 4;

type Outcome<T> = Vec<Result<T, RankError<FsepError>>>;

fn ranks<T: Send>(n: usize, program: impl Fn(Arc<dyn Communicator>) -> Result<T, FsepError> + Sync) -> Outcome<T> {
    launch(&LaunchConfig::new(n).with_timeout(Duration::from_secs(20)), program)
}

/// What each rank says, all of which fail.
fn messages<T: Debug>(results: Outcome<T>) -> Vec<String> {
    results.into_iter().map(|result| result.unwrap_err().to_string()).collect()
}

fn layer(runtime: &FsepRuntime) -> Result<FSEPMoE, FsepError> {
    FSEPMoEConfig::new(HIDDEN, 6, 4).with_slots_per_rank(Some(3)).try_init(runtime, &device())
}

fn input(tokens: usize) -> Tensor<2> {
    let values: Vec<f32> = (0..tokens * HIDDEN).map(|i| (i as f32 * 0.7).sin()).collect();
    Tensor::from_data(TensorData::new(values, [tokens, HIDDEN]), &device())
}

fn is_zero(gradient: Tensor<2>) -> bool {
    gradient.abs().sum().into_scalar::<f32>() == 0.0
}

#[test]
fn no_rank_has_a_token() {
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let layer = layer(&runtime)?;
        runtime.run(|| {
            let output = layer.forward(input(0).require_grad());
            let grads = output.clone().sum().backward();
            let experts = layer.experts.weight.val().grad(&grads).expect("zeros are registered");
            (output.dims(), is_zero(experts))
        })
    });
    for result in results {
        assert_eq!(result.unwrap(), ([0, HIDDEN], true));
    }
}

#[test]
fn all_tokens_go_to_one_slot_of_one_rank() {
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let mut layer = FSEPMoEConfig::new(HIDDEN, 6, 2)
            .with_moe_router_topk(1)
            .with_slots_per_rank(Some(1))
            .try_init(&runtime, &device())?;
        layer.router.weight = layer.router.weight.map(|w| {
            let data = TensorData::new([1.0f32, -1.0].repeat(HIDDEN), [HIDDEN, 2]);
            Tensor::from_data(data, &w.device()).require_grad()
        });
        runtime.run(|| {
            let grads = layer.forward(Tensor::<2>::ones([3, HIDDEN], &device())).sum().backward();
            let shards = layer.experts.weight.val().grad(&grads).expect("zeros are registered");
            let width = shards.dims()[1];
            (is_zero(shards.clone().slice([0..1, 0..width])), is_zero(shards.slice([1..2, 0..width])))
        })
    });
    for result in results {
        assert_eq!(result.unwrap(), (false, true), "expert 0 has all tokens, expert 1 none");
    }
}

/// Gradients of input, router and experts: whether there are any.
fn gradients_with(freeze: fn(FSEPMoE) -> FSEPMoE, tracks_input: bool) -> Vec<[bool; 3]> {
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let layer = freeze(layer(&runtime)?);
        runtime.run(|| {
            let x = if tracks_input { input(5).require_grad() } else { input(5) };
            let output = layer.forward(x.clone());
            if !output.is_tracked() {
                return [false; 3];
            }
            let grads = output.sum().backward();
            [
                x.grad(&grads).is_some(),
                layer.router.weight.val().grad(&grads).is_some(),
                layer.experts.weight.val().grad(&grads).is_some(),
            ]
        })
    });
    results.into_iter().map(Result::unwrap).collect()
}

fn frozen(param: Param<Tensor<2>>) -> Param<Tensor<2>> {
    param.set_require_grad(false)
}

#[test]
fn frozen_parameters() {
    let router = |mut layer: FSEPMoE| {
        layer.router.weight = frozen(layer.router.weight);
        layer
    };
    let experts = |mut layer: FSEPMoE| {
        layer.experts.weight = frozen(layer.experts.weight);
        layer
    };
    assert_eq!(gradients_with(|layer| layer, true), [[true, true, true]; 2]);
    assert_eq!(gradients_with(router, true), [[true, false, true]; 2]);
    assert_eq!(gradients_with(experts, true), [[true, true, false]; 2]);
    assert_eq!(gradients_with(experts, false), [[false, true, false]; 2]);
    assert_eq!(gradients_with(|layer| layer.no_grad(), true), [[true, false, false]; 2]);
    assert_eq!(gradients_with(|layer| layer.no_grad(), false), [[false, false, false]; 2]);
}

#[test]
fn ranks_that_freeze_different_parameters_are_told_before_anything_is_computed() {
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let mut layer = layer(&runtime)?;
        if runtime.rank() == 1 {
            layer.experts.weight = frozen(layer.experts.weight);
        }
        layer.try_forward(input(5)).map(|_| ())
    });
    for result in results {
        let Err(RankError::Failed { error, .. }) = result else { panic!("{result:?}") };
        assert!(matches!(error, FsepError::Divergence { what: "the wanted gradients", .. }), "{error}");
    }
}

#[test]
fn ranks_with_different_layouts_are_told_before_anything_is_computed() {
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let layer = layer(&runtime)?;
        let layout = burn_fsep_tests::random_layout(2, 3, 4, runtime.rank() as u64);
        runtime.set_layout(0, Arc::new(layout))?;
        layer.try_forward(input(5)).map(|_| ())
    });
    for result in results {
        let Err(RankError::Failed { error, .. }) = result else { panic!("{result:?}") };
        assert!(matches!(error, FsepError::Divergence { what: "the layout", .. }), "{error}");
    }
}

/// Two layers, the second of which rank 1 does not use.
fn unused_output(connect: bool) -> Outcome<Vec<f32>> {
    ranks(2, move |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let (first, second) = (layer(&runtime)?, layer(&runtime)?);
        runtime.run(|| {
            let hidden = first.forward(input(5));
            let unused = second.forward(hidden.clone());
            let loss = if runtime.rank() == 0 { unused.sum() } else { hidden.sum() };
            let loss = if connect { runtime.connect(loss) } else { loss };
            let grads = loss.backward();
            let grad = second.experts.weight.val().grad(&grads).expect("zeros are registered");
            // What the strategy does after backward.
            let mut sum = [0.0];
            let buffer = burn_fsep::comm::ReduceBuffer::F32(&mut sum);
            let operation = burn_fsep::comm::Operation::new("end of the step");
            runtime.comm().all_reduce(operation, buffer, burn_fsep::comm::ReduceOp::Sum).unwrap();
            grad.into_data().iter::<f32>().collect()
        })
    })
}

#[test]
fn a_layer_that_one_rank_does_not_use_gets_the_others_gradients() {
    let connected: Vec<f32> = unused_output(true).into_iter().flat_map(Result::unwrap).collect();
    assert!(connected.iter().any(|&g| g != 0.0));

    // Rank 1's tokens count for nothing in the second layer: as if the loss had weight 0 there.
    let reference = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let (first, second) = (layer(&runtime)?, layer(&runtime)?);
        runtime.run(|| {
            let hidden = first.forward(input(5));
            let output = second.forward(hidden.clone());
            let weight = if runtime.rank() == 0 { 1.0 } else { 0.0 };
            let grads = (output.sum() * weight + hidden.sum() * (1.0 - weight)).backward();
            let grad = second.experts.weight.val().grad(&grads).expect("gradient");
            grad.into_data().iter::<f32>().collect::<Vec<f32>>()
        })
    });
    let reference: Vec<f32> = reference.into_iter().flat_map(Result::unwrap).collect();
    assert_eq!(connected, reference);
}

#[test]
fn a_layer_that_is_not_connected_is_a_clear_error() {
    let results = unused_output(false);
    let errors = messages(results);
    assert!(errors[0].contains("rank 1") || errors[0].contains("rank(s) [1]"), "{errors:?}");
    assert!(errors[0].contains("layer 1"), "{errors:?}");
}

#[test]
fn a_layer_whose_backward_has_run_is_not_connected_again() {
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let (first, second) = (layer(&runtime)?, layer(&runtime)?);
        runtime.run(|| {
            // A step with both layers and without `connect`, then one with the first layer alone.
            drop(second.forward(first.forward(input(5))).sum().backward());
            let grads = runtime.connect(first.forward(input(5)).sum()).backward();
            let has_gradient = |layer: &FSEPMoE| layer.experts.weight.val().grad(&grads).is_some();
            (has_gradient(&first), has_gradient(&second))
        })
    });
    for result in results {
        assert_eq!(result.unwrap(), (true, false));
    }
}

#[test]
fn a_runtime_is_freed_with_its_model_also_without_backward() {
    let comm: Arc<dyn Communicator> = Arc::new(LocalCommunicator::single());
    let alive = Arc::downgrade(&comm);
    let runtime = FsepRuntime::new(comm).unwrap();
    let layer = FSEPMoEConfig::new(HIDDEN, 6, 4).try_init(&runtime, &device()).unwrap();
    assert!(layer.forward(input(5)).is_tracked());
    drop((runtime, layer));
    // Burn frees graphs that nobody can use any more after the next backward pass of any graph.
    for _ in 0..100 {
        drop(input(1).require_grad().sum().backward());
        if alive.upgrade().is_none() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the runtime is still alive");
}

#[test]
fn a_rank_without_peers_goes_on_after_an_error() {
    let runtime = FsepRuntime::single();
    let layer = FSEPMoEConfig::new(HIDDEN, 6, 4).try_init(&runtime, &device()).unwrap();
    assert!(layer.try_forward(Tensor::<2>::ones([3, HIDDEN + 1], &device())).is_err());
    assert!(runtime.run(|| panic!("out of luck")).is_err());
    layer.try_forward(input(5)).unwrap();
}

#[test]
fn inputs_of_the_wrong_shape_are_refused() {
    let runtime = FsepRuntime::single();
    let layer = FSEPMoEConfig::new(HIDDEN, 6, 4).try_init(&runtime, &device()).unwrap();
    let error = layer.try_forward(Tensor::<2>::ones([3, HIDDEN + 1], &device())).unwrap_err();
    assert!(matches!(error, FsepError::Shape { .. }), "{error}");
}

#[test]
fn inputs_of_another_type_are_refused() {
    let runtime = FsepRuntime::single();
    let layer = FSEPMoEConfig::new(HIDDEN, 6, 4).try_init(&runtime, &device()).unwrap();
    let error = layer.try_forward(input(3).cast(DType::F64)).unwrap_err();
    assert!(matches!(&error, FsepError::Shape { what, .. } if what.contains("element type")), "{error}");
}

/// On an input without tokens of these sizes: that its output and gradient are as empty; whether the gradients of router and
/// experts are zero.
fn empty_step(
    dims: [usize; 3],
    parameters: [Tensor<2>; 2],
    forward: impl FnOnce(Tensor<3>) -> MoeOutput<3>,
) -> [bool; 2] {
    let x = Tensor::<3>::zeros(dims, &device()).require_grad();
    let output = forward(x.clone());
    assert_eq!(output.hidden.dims(), dims);
    let grads = (output.hidden.sum() + output.aux_loss.expect("both losses are on")).backward();
    assert_eq!(x.grad(&grads).expect("input gradient").dims(), dims);
    parameters.map(|parameter| parameter.grad(&grads).is_none_or(is_zero))
}

#[test]
fn inputs_without_tokens_are_empty_outputs() {
    let config = FSEPMoEConfig::new(HIDDEN, 6, 4).with_moe_aux_loss_coeff(0.1).with_moe_z_loss_coeff(0.1);
    for dims in [[0, 3, HIDDEN], [3, 0, HIDDEN], [0, 0, HIDDEN]] {
        let dense = config.init_dense(5, 0, &device()).unwrap();
        let parameters = [dense.router.weight.val(), dense.weight.val()];
        assert_eq!(empty_step(dims, parameters, |x| dense.try_forward(x).unwrap()), [true; 2]);
        // Alone, and beside a rank that has tokens.
        for n in [1, 2] {
            let results = ranks(n, |comm| {
                let (rank, runtime) = (comm.rank(), FsepRuntime::new(comm)?);
                let layer = config.try_init(&runtime, &device())?;
                let parameters = [layer.router.weight.val(), layer.experts.weight.val()];
                runtime.run(|| match rank {
                    0 => empty_step(dims, parameters, |x| layer.forward_with_losses(x)),
                    _ => {
                        let grads = layer.forward(input(5).require_grad()).sum().backward();
                        parameters.map(|parameter| parameter.grad(&grads).is_none_or(is_zero))
                    }
                })
            });
            // Shards have the gradients of all ranks' tokens.
            let expected = [[true, n == 1], [false, false]];
            for (result, expected) in results.into_iter().zip(expected) {
                assert_eq!(result.unwrap(), expected);
            }
        }
    }
}

#[test]
fn logits_that_are_not_finite_are_refused_on_every_rank() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let results = ranks(2, |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let layer = layer(&runtime)?;
            let x = input(5);
            // One number of one token of one rank.
            let x = if runtime.rank() == 1 { x.slice_fill([2..3, 0..1], bad) } else { x };
            layer.try_forward(x).map(|_| ())
        });
        for result in results {
            let Err(RankError::Failed { error, .. }) = result else { panic!("{bad}: {result:?}") };
            assert_eq!(error, FsepError::NoExpert { layer: 0, rank: 1 }, "{bad}");
            let message = error.to_string();
            assert!(message.contains("rank 1") && message.contains("not finite"), "{bad}: {message}");
        }
    }
    // A logit of minus infinity among others only rules an expert out.
    let mut layer = FSEPMoEConfig::new(HIDDEN, 6, 4).try_init(&FsepRuntime::single(), &device()).unwrap();
    layer.router.weight =
        layer.router.weight.map(|w| w.slice_fill([0..HIDDEN, 1..2], f32::NEG_INFINITY).detach().require_grad());
    let output = layer.try_forward(Tensor::<2>::ones([3, HIDDEN], &device())).unwrap().hidden;
    assert!(output.into_data().iter::<f32>().all(f32::is_finite));
}

#[test]
fn impossible_configurations_are_refused() {
    let base = FSEPMoEConfig::new(HIDDEN, 6, 4);
    for (config, named) in [
        (FSEPMoEConfig::new(0, 6, 4), "hidden_size"),
        (FSEPMoEConfig::new(HIDDEN, 0, 4), "moe_ffn_hidden_size"),
        (FSEPMoEConfig::new(1 << 31, 1 << 31, 4), "more than any machine"),
        (base.clone().with_moe_router_topk(5), "top-k"),
        (base.clone().with_slots_per_rank(Some(5)), "slots"),
        (base.clone().with_moe_aux_loss_coeff(f64::NAN), "moe_aux_loss_coeff"),
        (base.clone().with_moe_router_force(Some(RouterForcing::Shares(vec![1.0]))), "moe_router_force"),
    ] {
        let error = config.try_init(&FsepRuntime::single(), &device()).unwrap_err().to_string();
        assert!(error.contains(named), "{named}: {error}");
    }
    let two = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        base.clone().with_slots_per_rank(Some(1)).try_init(&runtime, &device()).map(|_| ())
    });
    assert!(two.iter().all(|r| matches!(
        r,
        Err(RankError::Failed { error: FsepError::Planner(burn_fsep_planner::PlannerError::TooFewSlots { .. }), .. })
    )));
}

#[test]
fn a_single_rank_never_waits() {
    let runtime = FsepRuntime::single();
    let error = runtime.run(|| runtime.comm().abort("done")).map(|()| runtime.comm().failure());
    assert!(matches!(error, Ok(Some(CommError::PeerFailed { rank: 0, .. }))));
}

/// Layers in bf16, a loss in f32, and a rank whose loss does not depend on the layer.
#[test]
fn a_loss_of_another_type_is_connected() {
    let results = ranks(2, |comm| {
        let (rank, runtime) = (comm.rank(), FsepRuntime::new(comm)?);
        let layer = FSEPMoEConfig::new(HIDDEN, 6, 4)
            .with_compute_dtype(Some(FloatDType::BF16))
            .try_init(&runtime, &device())?;
        runtime.run(|| {
            let output = layer.forward(input(3).cast(FloatDType::BF16));
            let loss = match rank {
                0 => output.cast(FloatDType::F32).sum(),
                _ => Tensor::<1>::ones([1], &device()).require_grad(),
            };
            let loss = runtime.connect(loss);
            let grads = loss.backward();
            let experts = layer.experts.weight.val().grad(&grads).expect("all ranks take part");
            (loss.dtype(), experts.dtype(), is_zero(experts))
        })
    });
    for result in results {
        assert_eq!(result.unwrap(), (DType::F32, DType::F32, false));
    }
}

/// As after loading one rank's record on all of them.
#[test]
fn shards_of_another_rank_are_refused() {
    let records = std::sync::Mutex::new(None);
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let layer = layer(&runtime)?;
        if runtime.rank() == 0 {
            *records.lock().unwrap() = Some(layer.clone().into_record().into_bytes().unwrap());
        }
        runtime.comm().barrier(Operation::new("rank 0 has saved"))?;
        let record = ModuleRecord::from_bytes(records.lock().unwrap().clone().unwrap()).unwrap();
        let layer = layer.try_load_record(record).unwrap();
        layer.try_forward(input(3)).map(|output| output.hidden.dims())
    });
    let errors = messages(results);
    assert!(errors.iter().all(|said| said.contains("layer 0 of rank 1 has the shards of rank 0")), "{errors:?}");
}

#[test]
fn adapters_of_shards_are_refused() {
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        layer(&runtime)?.apply_lora(Lora::new(2, 1.0)).try_forward(input(3)).map(|output| output.hidden.dims())
    });
    let errors = messages(results);
    assert!(errors.iter().any(|said| said.contains("the experts of layer 0 are reparameterized")), "{errors:?}");
}

#[test]
fn adapters_beside_the_shards_train() {
    let results = ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let group = ParamGroup::all().exclude(ParamGroup::from_predicate("experts"));
        let layer = layer(&runtime)?.apply_lora(Lora::new(2, 1.0).set_param_group(group));
        runtime.run(|| drop(layer.forward(input(3)).sum().backward()))
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}
