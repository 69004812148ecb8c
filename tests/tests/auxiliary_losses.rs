//! Auxiliary losses are those of the whole batch, however its tokens are split over ranks.

use burn::tensor::{Tensor, TensorData};
use burn_fsep::{FSEPMoEConfig, FsepRuntime, comm::local::LaunchConfig};
use burn_fsep_tests::{assert_close, device, launch};

/// The mean over ranks of their losses, and of the router's gradients. Ranks have `split` of the batch's tokens, in its order.
///
/// `router`: `[D, E]`, `batch`: `[T, D]`, both row by row.
fn of_ranks(config: &FSEPMoEConfig, router: &[f32], batch: &[f32], split: &[usize]) -> (f64, TensorData) {
    let results = launch(&LaunchConfig::new(split.len()), |comm| {
        let (rank, runtime) = (comm.rank(), FsepRuntime::new(comm)?);
        let mut layer = config.try_init(&runtime, &device())?;
        layer.router.weight = layer.router.weight.map(|weight| parameter(router, weight));
        let start = split[..rank].iter().sum::<usize>() * config.hidden_size;
        let mine = &batch[start..start + split[rank] * config.hidden_size];
        let x = Tensor::<2>::from_data(TensorData::new(mine.to_vec(), [split[rank], config.hidden_size]), &device());
        runtime.run(|| {
            let output = layer.forward_with_losses(x);
            let loss = output.aux_loss.expect("a loss is on");
            let value = f64::from(loss.clone().into_scalar::<f32>());
            // As a step does it: every rank's backward pass goes through the layer.
            let grads = (loss + output.hidden.sum() * 0.0).backward();
            (value, layer.router.weight.val().grad(&grads).expect("router gradient").into_data())
        })
    });
    let results: Vec<(f64, TensorData)> =
        results.into_iter().map(|rank| rank.unwrap_or_else(|e| panic!("{e}"))).collect();
    let ranks = results.len() as f64;
    let mut mean = vec![0.0; router.len()];
    for (_, gradient) in &results {
        mean.iter_mut().zip(gradient.iter::<f64>()).for_each(|(sum, g)| *sum += g / ranks);
    }
    (results.iter().map(|(loss, _)| loss / ranks).sum(), TensorData::new(mean, [router.len()]))
}

/// The same of the dense layer with the whole batch.
fn of_dense(config: &FSEPMoEConfig, router: &[f32], batch: &[f32]) -> (f64, TensorData) {
    let mut dense = config.init_dense(0, 0, &device()).unwrap();
    dense.router.weight = dense.router.weight.map(|weight| parameter(router, weight));
    let x = TensorData::new(batch.to_vec(), [batch.len() / config.hidden_size, config.hidden_size]);
    let loss = dense.try_forward(Tensor::<2>::from_data(x, &device())).unwrap().aux_loss.expect("a loss is on");
    let grads = loss.clone().backward();
    let gradient = dense.router.weight.val().grad(&grads).expect("router gradient").into_data();
    let gradient = TensorData::new(gradient.iter::<f64>().collect(), [router.len()]);
    (f64::from(loss.into_scalar::<f32>()), gradient)
}

fn parameter(values: &[f32], weight: Tensor<2>) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), weight.dims()), &weight.device()).require_grad()
}

fn assert_near(actual: f64, expected: f64, split: &[usize]) {
    assert!((actual - expected).abs() <= 1e-6 * expected, "{actual} is not {expected}, {split:?}");
}

/// 10 tokens with probabilities (.9, .1) and 30 with (.4, .6): E * sum f P = 2 (.25 * .525 + .75 * .475).
#[test]
fn the_balancing_loss_of_a_split_batch() {
    let config = FSEPMoEConfig::new(2, 3, 2).with_moe_router_topk(1).with_moe_aux_loss_coeff(1.0);
    let router = [0.9f32, 0.1, 0.4, 0.6].map(f32::ln);
    let batch = [[1.0f32, 0.0].repeat(10), [0.0, 1.0].repeat(30)].concat();
    let (expected, gradient) = of_dense(&config, &router, &batch);
    assert_near(expected, 0.975, &[40]);
    for split in [vec![40], vec![10, 30], vec![0, 40], vec![20, 20], vec![10, 0, 13, 17], vec![0, 0, 0, 40]] {
        let (loss, mean) = of_ranks(&config, &router, &batch, &split);
        assert_near(loss, 0.975, &split);
        assert_close(&format!("router gradient, {split:?}"), &mean, &gradient, 1e-6);
    }
}

#[test]
fn both_losses_of_a_batch_of_any_split() {
    let config = FSEPMoEConfig::new(6, 5, 8).with_moe_aux_loss_coeff(0.3).with_moe_z_loss_coeff(0.2);
    let values = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<_>>();
    let (router, batch) = (values(6 * 8, 0.9), values(23 * 6, 0.37));
    let (expected, gradient) = of_dense(&config, &router, &batch);
    for split in [vec![23], vec![5, 18], vec![23, 0], vec![1, 0, 20, 2], vec![6, 6, 6, 5]] {
        let (loss, mean) = of_ranks(&config, &router, &batch, &split);
        assert_near(loss, expected, &split);
        assert_close(&format!("router gradient, {split:?}"), &mean, &gradient, 2e-6);
    }
}

/// Whatever the choice among equals is.
#[test]
fn losses_of_uniform_probabilities() {
    let config = FSEPMoEConfig::new(4, 3, 8);
    let (balancing, z) = (config.clone().with_moe_aux_loss_coeff(1.0), config.with_moe_z_loss_coeff(1.0));
    for split in [vec![32], vec![32, 0], vec![0, 32], vec![5, 27], vec![0, 0, 1, 31], vec![8, 8, 8, 8]] {
        let batch = vec![0.5; 32 * 4];
        let uniform = |config| of_ranks(config, &[0.0; 4 * 8], &batch, &split).0;
        assert_near(uniform(&balancing), 1.0, &split);
        assert_near(uniform(&z), 4.324077, &split);
    }
}

#[test]
fn losses_without_a_token_are_zero() {
    let config = FSEPMoEConfig::new(4, 3, 8).with_moe_aux_loss_coeff(1.0).with_moe_z_loss_coeff(1.0);
    for split in [vec![0], vec![0, 0]] {
        let (loss, gradient) = of_ranks(&config, &[0.1; 4 * 8], &[], &split);
        assert_eq!(loss, 0.0);
        assert!(gradient.iter::<f64>().all(|g| g == 0.0));
    }
}
