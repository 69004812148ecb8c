//! A loss that is the mean over the tokens of all ranks, however many each has.

use std::time::Duration;

use burn::{
    nn::{Linear, loss::CrossEntropyLossConfig},
    optim::{AdamWConfig, GradientsParams},
    tensor::{Int, Tensor, TensorData, activation::log_softmax},
};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntime,
    comm::local::LaunchConfig,
    train::{TrainerConfig, sync_gradients, token_mean, try_token_mean},
};
use burn_fsep_tests::{device, fixed_linear, launch};

const FEATURES: usize = 5;
const CLASSES: usize = 4;

/// Inputs and classes of tokens `start..start + len` of all.
fn tokens(start: usize, len: usize) -> (Tensor<2>, Tensor<1, Int>) {
    let inputs = (start * FEATURES..(start + len) * FEATURES).map(|i| (i as f32 * 1.3).sin()).collect::<Vec<_>>();
    let classes = (start..start + len).map(|i| (i * i % CLASSES) as i64).collect::<Vec<_>>();
    (
        Tensor::from_data(TensorData::new(inputs, [len, FEATURES]), &device()),
        Tensor::from_data(TensorData::new(classes, [len]), &device()),
    )
}

fn model() -> Linear {
    fixed_linear(FEATURES, CLASSES, 1, &device())
}

/// The sum of the tokens' cross entropies.
fn sum(model: &Linear, (inputs, classes): (Tensor<2>, Tensor<1, Int>)) -> Tensor<1> {
    let len = classes.dims()[0];
    let logs = log_softmax(model.forward(inputs), 1);
    -logs.gather(1, classes.reshape([len, 1])).sum()
}

fn gradient(model: &Linear, grads: &GradientsParams) -> Vec<f32> {
    grads.get::<2>(model.weight.id).unwrap().into_data().try_to_vec().unwrap()
}

#[test]
fn gradients_are_those_of_all_tokens_in_one_batch() {
    let dense = model();
    let (inputs, classes) = tokens(0, 40);
    let loss = CrossEntropyLossConfig::new().init(&device()).forward(dense.forward(inputs), classes);
    let expected_loss = loss.clone().into_scalar::<f32>();
    let expected = gradient(&dense, &GradientsParams::from_grads(loss.backward(), &dense));
    for lens in [vec![40], vec![10, 30], vec![0, 40], vec![13, 0, 27], vec![10, 10, 10, 10]] {
        let results = launch(&LaunchConfig::new(lens.len()), |comm| -> Result<_, FsepError> {
            let runtime = FsepRuntime::new(comm)?;
            let (model, rank) = (model(), runtime.rank());
            let start = lens[..rank].iter().sum();
            let loss = runtime.run(|| token_mean(&runtime, sum(&model, tokens(start, lens[rank])), lens[rank]))?;
            let value = loss.clone().into_scalar::<f32>();
            let mut grads = GradientsParams::from_grads(loss.backward(), &model);
            sync_gradients(&runtime, &model, &mut grads)?;
            Ok((value, gradient(&model, &grads)))
        });
        let ranks: Vec<_> = results.into_iter().map(Result::unwrap).collect();
        let mean = ranks.iter().map(|(loss, _)| loss / ranks.len() as f32).sum::<f32>();
        assert!((mean - expected_loss).abs() < 1e-6, "{lens:?}: {mean} instead of {expected_loss}");
        for (_, actual) in ranks {
            let error = actual.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 1e-6, "{lens:?}: {error:e}");
        }
    }
}

#[test]
fn ten_tokens_weigh_a_quarter_of_forty() {
    // Means of 1.468941 over 10 tokens and 1.328489 over 30; the mean of the two would be 1.398715.
    let (lens, means) = ([10, 30], [1.468_941, 1.328_489]);
    let losses = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let rank = runtime.rank();
        let sum = Tensor::<1>::from_data([(means[rank] * lens[rank] as f64) as f32], &device());
        Ok(try_token_mean(&runtime, sum, lens[rank])?.into_scalar::<f32>())
    });
    let mean = losses.into_iter().map(|loss| f64::from(loss.unwrap()) / 2.0).sum::<f64>();
    assert!((mean - 1.363_602).abs() < 1e-6, "{mean}");
}

#[test]
fn no_token_on_any_rank_is_an_error_on_all() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let none = || Tensor::<1>::zeros([1], &device());
        let error = try_token_mean(&runtime, none(), 0).unwrap_err();
        // All ranks have it alike, so the group goes on.
        assert!(try_token_mean(&runtime, none(), runtime.rank()).is_ok());
        let unwound = runtime.run(|| token_mean(&runtime, none(), 0)).unwrap_err();
        Ok((error, unwound))
    });
    for (error, unwound) in results.into_iter().map(Result::unwrap) {
        assert!(error.to_string().contains("tokens of all ranks"), "{error}");
        assert_eq!(error, unwound);
    }
}

#[test]
fn a_rank_without_a_token_mean_is_told_what_the_others_wait_in() {
    let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(1)), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let layer = FSEPMoEConfig::new(4, 6, 4).try_init(&runtime, &device())?;
        let mut trainer = TrainerConfig::new().init(&runtime, layer, AdamWConfig::new().init())?;
        let mut step = |has_mean: bool| {
            let x = Tensor::<2>::ones([6, 4], &device());
            let loss = trainer.step(1e-3, |layer| {
                let sum = layer.forward(x).sum();
                if has_mean { token_mean(&runtime, sum, 6) } else { sum / 6.0 }
            });
            loss.map(drop)
        };
        step(true)?;
        Ok(step(runtime.rank() == 0).unwrap_err().to_string())
    });
    for error in results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))) {
        // One that the rank waits in, and one that the other does.
        assert!(error.contains("number of tokens") && error.contains("backward of layer 0"), "{error}");
        assert!(error.contains("Meanwhile rank "), "{error}");
    }
}
