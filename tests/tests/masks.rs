//! With a mask of real tokens, everything is as without the padding.

use std::sync::Arc;

use burn::tensor::{Bool, Tensor, TensorData};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::local::LaunchConfig,
    moe::{MoeOutput, TokenMask},
};
use burn_fsep_planner::RoutingCounts;
use burn_fsep_tests::{TOKEN_TRAVEL, assert_close, device, launch};

const HIDDEN: usize = 6;
/// Sequences of a rank, and tokens of a sequence with its padding.
const SHAPE: [usize; 2] = [3, 5];

/// Lengths of the sequences of each rank: the first has real tokens alone, the last padding alone, unless there is one rank.
fn lengths(rank: usize, ranks: usize) -> [usize; 3] {
    match rank {
        _ if ranks == 1 => [2, 0, 5],
        0 => [5, 5, 5],
        _ if rank == ranks - 1 => [0, 0, 0],
        _ => [rank, 4, 0],
    }
}

/// Which tokens are real, by sequence.
fn real(lengths: [usize; 3]) -> Vec<bool> {
    lengths.iter().flat_map(|&len| (0..SHAPE[1]).map(move |position| position < len)).collect()
}

/// A rank's tokens, padding included, and what it wants of them. `[B * L * D]` each; padding is no number at all.
fn batch(rank: usize, real: &[bool]) -> [Vec<f32>; 2] {
    let value = |i: usize, step: f32| ((i + 101 * rank) as f32 * step).sin();
    let x = (0..real.len() * HIDDEN).map(|i| if real[i / HIDDEN] { value(i, 0.37) } else { f32::NAN });
    [x.collect(), (0..real.len() * HIDDEN).map(|i| value(i, 0.81)).collect()]
}

/// The rows of the real tokens.
fn without_padding(values: &[f32], real: &[bool]) -> Vec<f32> {
    let rows = values.chunks(HIDDEN).zip(real).filter(|(_, real)| **real);
    rows.flat_map(|(row, _)| row.iter().copied()).collect()
}

fn tensor<const R: usize>(values: &[f32], dims: [usize; R]) -> Tensor<R> {
    Tensor::from_data(TensorData::new(values.to_vec(), dims), &device())
}

fn floats<const R: usize>(tensor: Tensor<R>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// What a step leaves: output, auxiliary losses, gradients of input, router and experts.
type Step = [Vec<f32>; 5];

fn step<const R: usize>(
    x: Tensor<R>,
    target: Tensor<R>,
    parameters: [Tensor<2>; 2],
    forward: impl FnOnce(Tensor<R>) -> MoeOutput<R>,
) -> Step {
    let x = x.require_grad();
    let output = forward(x.clone());
    let aux_loss = output.aux_loss.expect("both losses are on");
    let grads = ((output.hidden.clone() * target).sum() + aux_loss.clone()).backward();
    let [router, experts] = parameters.map(|parameter| match parameter.grad(&grads) {
        Some(gradient) => floats(gradient),
        None => vec![0.0; parameter.shape().num_elements()],
    });
    let d_input = floats(x.grad(&grads).expect("input gradient"));
    [floats(output.hidden.inner()), floats(aux_loss), d_input, router, experts]
}

/// Compares a step with a mask to one without padding; padded rows of the former are zeros.
fn compare(what: &str, masked: &Step, plain: &Step, real: &[bool]) {
    let names = ["output", "losses", "input gradient", "router gradient", "experts' gradient"];
    for (name, (masked, plain)) in names.into_iter().zip(masked.iter().zip(plain)) {
        let is_by_token = matches!(name, "output" | "input gradient");
        if is_by_token {
            let padding: Vec<bool> = real.iter().map(|real| !real).collect();
            assert!(without_padding(masked, &padding).iter().all(|&value| value == 0.0), "{what}, padding of {name}");
        }
        let masked = if is_by_token { without_padding(masked, real) } else { masked.clone() };
        let data = |values: &[f32]| TensorData::new(values.to_vec(), [values.len()]);
        assert_close(&format!("{what}, {name}"), &data(&masked), &data(plain), 1e-6);
    }
}

fn config() -> FSEPMoEConfig {
    FSEPMoEConfig::new(HIDDEN, 7, 4).with_moe_aux_loss_coeff(0.1).with_moe_z_loss_coeff(0.05)
}

#[test]
fn a_masked_step_is_that_without_padding() {
    for (ranks, travel) in [1, 2, 4].into_iter().flat_map(|ranks| TOKEN_TRAVEL.map(|travel| (ranks, travel))) {
        let run = |is_masked: bool| {
            let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
                let rank = comm.rank();
                let runtime = travel.of(FsepRuntimeConfig::new()).init(comm)?;
                let layer = config().try_init(&runtime, &device())?;
                let parameters = [layer.router.weight.val(), layer.experts.weight.val()];
                let real = real(lengths(rank, ranks));
                let batch = batch(rank, &real);
                let step = runtime.run(|| {
                    if is_masked {
                        let mask = Tensor::<2, Bool>::from_data(TensorData::new(real.clone(), SHAPE), &device());
                        let mask = TokenMask::from_tensor(mask).expect("the device answers");
                        let [x, target] = batch.map(|values| tensor(&values, [SHAPE[0], SHAPE[1], HIDDEN]));
                        step(x, target, parameters, |x| layer.forward_masked(x, &mask))
                    } else {
                        let rows = real.iter().filter(|real| **real).count();
                        let [x, target] = batch.map(|values| tensor(&without_padding(&values, &real), [rows, HIDDEN]));
                        step(x, target, parameters, |x| layer.forward_with_losses(x))
                    }
                })?;
                Ok((step, runtime.stats().layers[0].counts.clone()))
            });
            results
                .into_iter()
                .map(|rank| rank.unwrap_or_else(|e| panic!("{e}")))
                .collect::<Vec<(Step, Arc<RoutingCounts>)>>()
        };
        for (rank, (masked, plain)) in run(true).into_iter().zip(run(false)).enumerate() {
            let what = format!("rank {rank} of {ranks}, {travel:?}");
            compare(&what, &masked.0, &plain.0, &real(lengths(rank, ranks)));
            assert_eq!(masked.1, plain.1);
            let tokens: usize = (0..ranks).flat_map(|rank| lengths(rank, ranks)).sum();
            assert_eq!(masked.1.expert_totals().iter().sum::<u64>(), 2 * tokens as u64);
        }
    }
}

#[test]
fn a_masked_step_of_the_dense_layer_is_that_without_padding() {
    let dense = config().init_dense(0, 0, &device()).unwrap();
    let parameters = || [dense.router.weight.val(), dense.weight.val()];
    for lengths in [[5, 5, 5], [2, 0, 5], [0, 0, 0]] {
        let real = real(lengths);
        let [x, target] = batch(0, &real);
        let mask = TokenMask::new(&real, &device());
        let padded = |values: &[f32]| tensor(values, [SHAPE[0], SHAPE[1], HIDDEN]);
        let masked = step(padded(&x), padded(&target), parameters(), |x| dense.try_forward_masked(x, &mask).unwrap());
        let rows = |values: &[f32]| tensor(&without_padding(values, &real), [mask.num_real(), HIDDEN]);
        let plain = step(rows(&x), rows(&target), parameters(), |x| dense.try_forward(x).unwrap());
        compare("dense", &masked, &plain, &real);
    }
}

#[test]
fn a_mask_of_another_batch_is_refused() {
    let runtime = FsepRuntime::single();
    let (layer, dense) = (config().init(&runtime, &device()), config().init_dense(0, 0, &device()).unwrap());
    let mask = TokenMask::new(&[true; 14], &device());
    let x = || Tensor::<3>::ones([SHAPE[0], SHAPE[1], HIDDEN], &device());
    let fsep = runtime.run(|| layer.forward_masked(x(), &mask)).unwrap_err();
    for error in [fsep, dense.try_forward_masked(x(), &mask).unwrap_err()] {
        assert!(matches!(&error, FsepError::Shape { .. }), "{error}");
        assert!(error.to_string().contains("expected 15 tokens, as in the input [3, 5, 6], got 14"), "{error}");
    }
}
