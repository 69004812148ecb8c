//! Gradients reduced in buckets during backward are those that are reduced after it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use burn::{
    module::Module,
    nn::Linear,
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{DType, FloatDType, Tensor, TensorData, activation::tanh},
};
use burn_fsep::{
    FsepError, FsepRuntime,
    comm::{Communicator, local::LaunchConfig},
    train::{GradientBuckets, GradientBucketsConfig, sync_gradients},
};
use burn_fsep_tests::{Fault, FaultMode, FaultyCommunicator, assert_close, device, fixed_linear, launch, plain_device};

const WIDTH: usize = 6;

/// Blocks one after the other, and a head that may be used twice.
#[derive(Module, Debug)]
struct Model {
    blocks: Vec<Linear>,
    head: Linear,
}

fn model() -> Model {
    let linear = |seed| fixed_linear(WIDTH, WIDTH, seed, &device());
    Model { blocks: (0..4).map(linear).collect(), head: linear(9) }
}

/// What a forward pass does with the model.
#[derive(Debug, Clone, Copy)]
struct Use {
    /// A block that is left out.
    skip: Option<usize>,
    /// The head is also the first block.
    tied: bool,
    /// The head is not prepared, of blocks every second one.
    partly: bool,
    /// Its own input reaches the loss through nothing but the hooks.
    lonely_input: bool,
}

const PLAIN: Use = Use { skip: None, tied: false, partly: false, lonely_input: false };

fn loss(model: &Model, buckets: Option<&GradientBuckets>, what: Use, seed: usize, rows: usize) -> Tensor<1> {
    let values: Vec<f32> = (0..rows * WIDTH).map(|i| ((i + 31 * seed) as f32 * 0.7).sin()).collect();
    let mut x = Tensor::<2>::from_data(TensorData::new(values, [rows, WIDTH]), &device());
    let apply = |linear: &Linear, x: Tensor<2>, is_prepared: bool| {
        let linear = match buckets.filter(|_| is_prepared) {
            Some(buckets) => {
                // A view of its own, which nothing but the hook uses.
                let input = if what.lonely_input { x.clone() * 2.0 } else { x.clone() };
                buckets.prepare(linear, &input)
            }
            None => linear.clone(),
        };
        let dtype = linear.weight.dtype();
        tanh(linear.forward(x.cast(dtype)))
    };
    if what.tied {
        x = apply(&model.head, x, !what.partly);
    }
    for (i, block) in model.blocks.iter().enumerate() {
        if what.skip != Some(i) {
            x = x.clone().cast(DType::F32) + apply(block, x, !what.partly || i % 2 == 0).cast(DType::F32);
        }
    }
    let x = apply(&model.head, x, true);
    x.cast(DType::F32).square().sum()
}

fn ranks<T: Send>(n: usize, program: impl Fn(Arc<dyn Communicator>) -> Result<T, FsepError> + Sync) -> Vec<T> {
    let results = launch(&LaunchConfig::new(n).with_timeout(Duration::from_secs(20)), program);
    results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// Gradients in the order of the model, `None` where there is none.
fn values(model: &Model, grads: &GradientsParams) -> Vec<Option<TensorData>> {
    let linears = model.blocks.iter().chain([&model.head]);
    linears.map(|linear| grads.get::<2>(linear.weight.id).map(Tensor::into_data)).collect()
}

/// Gradients of `steps` steps, reduced after backward and in buckets; and how many reductions backward started.
type Compared = (Vec<Option<TensorData>>, Vec<Option<TensorData>>, usize);

/// `what` gives the use of a rank in a step.
fn compare(n: usize, bytes: usize, steps: usize, what: impl Fn(usize, usize) -> Use + Sync) -> Vec<Vec<Compared>> {
    ranks(n, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let (model, rank) = (model(), runtime.rank());
        let buckets = GradientBucketsConfig::new().with_bucket_bytes(bytes).init(&runtime);
        let mut results = Vec::new();
        for step in 0..steps {
            let (what, seed) = (what(rank, step), rank + n * step);
            let backward =
                |buckets| GradientsParams::from_grads(loss(&model, buckets, what, seed, 3).backward(), &model);
            let mut expected = backward(None);
            sync_gradients(&runtime, &model, &mut expected)?;
            let mut actual = backward(Some(&buckets));
            let started = buckets.num_started();
            buckets.sync(&model, &mut actual)?;
            results.push((values(&model, &actual), values(&model, &expected), started));
        }
        Ok(results)
    })
}

fn assert_equal(results: &[Vec<Compared>], tolerance: f64) {
    for (rank, steps) in results.iter().enumerate() {
        for (step, (actual, expected, _)) in steps.iter().enumerate() {
            for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
                let what = format!("parameter {i} of rank {rank} in step {step}");
                match (actual, expected) {
                    (Some(actual), Some(expected)) => _ = assert_close(&what, actual, expected, tolerance),
                    (None, None) => {}
                    _ => panic!("{what}: {} instead of {}", actual.is_some(), expected.is_some()),
                }
            }
            assert_eq!(steps[step].0, results[0][step].0, "ranks differ in step {step}");
        }
    }
}

#[test]
fn buckets_change_no_bit() {
    for n in [1, 2, 4] {
        // Five parameters of 144 bytes: a bucket each, two buckets, one that is filled by the last, one never full.
        for (bytes, buckets) in [(1, 5), (400, 2), (720, 1), (1 << 20, 1)] {
            let results = compare(n, bytes, 3, |_, _| PLAIN);
            assert_equal(&results, 0.0);
            for (_, _, started) in results.iter().flat_map(|steps| &steps[1..]) {
                assert_eq!(*started, if n == 1 { 0 } else { buckets }, "{n} ranks, {bytes} bytes");
            }
        }
    }
}

#[test]
fn a_parameter_that_some_ranks_do_not_use() {
    for bytes in [1, 300, 1 << 20] {
        // Another block on each rank; in the last step nobody uses the first one.
        let what = |rank: usize, step: usize| match step {
            3 => Use { skip: Some(0), ..PLAIN },
            _ if rank == 0 && step != 1 => PLAIN,
            _ => Use { skip: Some((rank + step) % 4), ..PLAIN },
        };
        let results = compare(3, bytes, 5, what);
        assert_equal(&results, 0.0);
        assert!(results[0][3].0[0].is_none(), "nobody has a gradient");
        assert!(results[0][4].2 > 0, "rank 0 starts reductions");
    }
}

#[test]
fn a_parameter_that_only_the_first_step_lacks() {
    let what = |_, step| if step == 0 { Use { skip: Some(2), ..PLAIN } } else { PLAIN };
    assert_equal(&compare(2, 1, 3, what), 0.0);
}

#[test]
fn tied_parameters() {
    for (partly, tolerance) in [(false, 1e-6), (true, 1e-6)] {
        for bytes in [1, 1 << 20] {
            let results = compare(2, bytes, 3, |_, _| Use { tied: true, partly, ..PLAIN });
            assert_equal(&results, tolerance);
            // The head is the first in backward: prepared twice, it is complete when the first block's input is reached.
            // Used once without preparing, it is started too early and reduced once more.
            let started = if partly { 3 } else { 5 };
            assert_eq!(results[0][2].2, if bytes == 1 { started } else { 1 });
        }
    }
}

#[test]
fn an_input_that_only_hooks_use() {
    assert_equal(&compare(2, 1, 2, |_, _| Use { lonely_input: true, ..PLAIN }), 1e-6);
}

#[test]
fn no_rows() {
    ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let (model, buckets) = (model(), GradientBucketsConfig::new().with_bucket_bytes(1).init(&runtime));
        for _ in 0..2 {
            let rows = 3 * runtime.rank();
            let what = Use { lonely_input: true, ..PLAIN };
            let mut grads = GradientsParams::from_grads(loss(&model, Some(&buckets), what, 1, rows).backward(), &model);
            buckets.sync(&model, &mut grads)?;
            let gradient = grads.get::<2>(model.head.weight.id).expect("a gradient").abs().sum().into_scalar::<f32>();
            assert!(gradient > 0.0, "half of rank 1's");
        }
        Ok(())
    });
}

#[test]
fn accumulated_gradients() {
    for pause in [false, true] {
        ranks(2, |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let (model, rank) = (model(), runtime.rank());
            let buckets = GradientBucketsConfig::new().with_bucket_bytes(1).init(&runtime);
            for step in 0..3 {
                let accumulate = |buckets: Option<&GradientBuckets>| {
                    let mut accumulator = GradientsAccumulator::new();
                    for pass in 0..2 {
                        if pause && let Some(buckets) = buckets {
                            buckets.pause();
                        }
                        let loss = loss(&model, buckets, PLAIN, rank + 2 * pass + 4 * step, 3);
                        accumulator.accumulate(&model, GradientsParams::from_grads(loss.backward(), &model));
                    }
                    accumulator.grads()
                };
                let mut expected = accumulate(None);
                sync_gradients(&runtime, &model, &mut expected)?;
                let mut actual = accumulate(Some(&buckets));
                assert_eq!(buckets.num_started(), if pause || step == 0 { 0 } else { 5 });
                buckets.sync(&model, &mut actual)?;
                assert_eq!(values(&model, &actual), values(&model, &expected), "paused: {pause}, step {step}");
            }
            Ok(())
        });
    }
}

#[test]
fn gradients_that_were_thrown_away_or_scaled() {
    ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let (model, rank) = (model(), runtime.rank());
        let buckets = GradientBucketsConfig::new().with_bucket_bytes(1).init(&runtime);
        for step in 0..3 {
            let backward =
                |buckets, seed| GradientsParams::from_grads(loss(&model, buckets, PLAIN, seed, 3).backward(), &model);
            // One rank alone does without a step.
            if rank == 1 {
                drop(backward(Some(&buckets), 77));
            }
            let halve = |grads: &mut GradientsParams| {
                let id = model.blocks[1].weight.id;
                let gradient = grads.remove::<2>(id).unwrap() * 0.5;
                grads.register(id, gradient);
            };
            let mut expected = backward(None, rank + 2 * step);
            halve(&mut expected);
            sync_gradients(&runtime, &model, &mut expected)?;
            let mut actual = backward(Some(&buckets), rank + 2 * step);
            halve(&mut actual);
            buckets.sync(&model, &mut actual)?;
            assert_eq!(values(&model, &actual), values(&model, &expected), "step {step}");
        }
        Ok(())
    });
}

#[test]
fn nothing_is_reduced_twice() {
    let never = Fault::Failure { rank: 0, at: usize::MAX, mode: FaultMode::Error };
    ranks(2, |comm| {
        let (comm, calls) = FaultyCommunicator::new(comm, never);
        let runtime = FsepRuntime::new(comm)?;
        let (model, buckets) = (model(), GradientBucketsConfig::new().with_bucket_bytes(1).init(&runtime));
        for step in 0..3 {
            let what = Use { tied: step == 2, ..PLAIN };
            let loss = loss(&model, Some(&buckets), what, runtime.rank(), 3);
            let mut grads = GradientsParams::from_grads(loss.backward(), &model);
            let before = calls.made.load(Ordering::Relaxed);
            buckets.sync(&model, &mut grads)?;
            // What ranks have, and a reduction for each of five parameters; the first step agrees on their order, too.
            let expected = if step == 0 { 7 } else { 6 };
            assert_eq!(calls.made.load(Ordering::Relaxed) - before, expected, "step {step}");
        }
        Ok(())
    });
}

#[test]
fn recomputed_activations() {
    let device = plain_device().autodiff().gradient_checkpointing();
    ranks(2, |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let buckets = GradientBucketsConfig::new().with_bucket_bytes(1).init(&runtime);
        let blocks = [1, 2, 3].map(|seed| fixed_linear(WIDTH, WIDTH, seed, &device));
        let blocks = blocks.to_vec();
        for step in 0..2 {
            let gradients = |buckets: Option<&GradientBuckets>| {
                let factor = (1 + runtime.rank() + step) as f32 * 0.1;
                let mut x = Tensor::<2>::full([3, WIDTH], factor, &device);
                for block in &blocks {
                    let block = buckets.map_or_else(|| block.clone(), |buckets| buckets.prepare(block, &x));
                    x = x.clone() + tanh(block.forward(x).exp());
                }
                GradientsParams::from_grads(x.square().sum().backward(), &blocks)
            };
            let mut expected = gradients(None);
            sync_gradients(&runtime, &blocks, &mut expected)?;
            let mut actual = gradients(Some(&buckets));
            assert_eq!(buckets.num_started(), 3 * step);
            buckets.sync(&blocks, &mut actual)?;
            for block in &blocks {
                let data = |grads: &GradientsParams| grads.get::<2>(block.weight.id).unwrap().into_data();
                assert_eq!(data(&actual), data(&expected));
            }
        }
        Ok(())
    });
}

#[test]
fn compute_in_half_precision_with_gradients_in_single() {
    for n in [1, 2] {
        ranks(n, |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let (model, rank) = (model(), runtime.rank());
            let config = GradientBucketsConfig::new().with_bucket_bytes(200).with_compute_dtype(Some(FloatDType::BF16));
            let buckets = config.init(&runtime);
            for step in 0..2 {
                let seed = rank + n * step;
                let prepared = buckets.prepare(&model.head, &Tensor::<2>::ones([1, WIDTH], &device()));
                assert_eq!(prepared.weight.dtype(), DType::BF16);
                let mut expected = GradientsParams::from_grads(loss(&model, None, PLAIN, seed, 3).backward(), &model);
                sync_gradients(&runtime, &model, &mut expected)?;
                let mut actual =
                    GradientsParams::from_grads(loss(&model, Some(&buckets), PLAIN, seed, 3).backward(), &model);
                buckets.sync(&model, &mut actual)?;
                for (actual, expected) in values(&model, &actual).into_iter().zip(values(&model, &expected)) {
                    let (actual, expected) = (actual.unwrap(), expected.unwrap());
                    assert_eq!(actual.dtype(), DType::F32);
                    let error = assert_close("gradient", &actual, &expected, 0.05);
                    assert!(error > 1e-5, "computed in half precision: {error}");
                }
            }
            Ok(())
        });
    }
}

#[test]
fn without_autodiff_parameters_are_cast() {
    let buckets = GradientBucketsConfig::new().with_compute_dtype(Some(FloatDType::BF16)).init(&FsepRuntime::single());
    let model = model().valid();
    let input = Tensor::<2>::ones([1, WIDTH], &plain_device());
    assert_eq!(buckets.prepare(&model.head, &input).weight.dtype(), DType::BF16);
}

#[test]
fn another_model_is_a_clear_error() {
    let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(20)), |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let buckets = GradientBuckets::new(&runtime);
        for _ in 0..2 {
            let model = model();
            let mut grads = GradientsParams::from_grads(loss(&model, Some(&buckets), PLAIN, 1, 3).backward(), &model);
            buckets.sync(&model, &mut grads)?;
        }
        Ok::<_, FsepError>(())
    });
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("made for one model"), "{error}");
    }
}

#[test]
fn models_that_differ_between_ranks_are_a_clear_error() {
    let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(20)), |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let width = WIDTH + runtime.rank();
        let model = fixed_linear(WIDTH, width, 1, &device());
        let loss = model.forward(Tensor::<2>::ones([1, WIDTH], &device())).sum();
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        sync_gradients(&runtime, &model, &mut grads)
    });
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("models or gradient buckets differ"), "{error}");
    }
}

#[test]
fn buckets_that_differ_between_ranks_are_a_clear_error() {
    // In size, or made anew on one rank.
    for is_size in [true, false] {
        let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(20)), |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let (model, rank) = (model(), runtime.rank());
            let bytes = if is_size { 200 + 200 * rank } else { 200 };
            let config = GradientBucketsConfig::new().with_bucket_bytes(bytes);
            let mut buckets = config.init(&runtime);
            for step in 0..3 {
                if !is_size && step == 2 && rank == 1 {
                    buckets = config.init(&runtime);
                }
                let loss = loss(&model, Some(&buckets), PLAIN, 1, 3);
                buckets.sync(&model, &mut GradientsParams::from_grads(loss.backward(), &model))?;
            }
            Ok::<_, FsepError>(())
        });
        for result in results {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("models or gradient buckets differ"), "{error}");
        }
    }
}

#[test]
fn a_rank_that_fails_after_starting_reductions_ends_the_others() {
    let results = launch(&LaunchConfig::new(2).with_timeout(Duration::from_secs(20)), |comm| {
        let runtime = FsepRuntime::new(comm)?;
        let (model, buckets) = (model(), GradientBucketsConfig::new().with_bucket_bytes(1).init(&runtime));
        for step in 0..2 {
            let grads = runtime.run(|| {
                let grads = loss(&model, Some(&buckets), PLAIN, 1, 3).backward();
                assert!(step == 0 || runtime.rank() == 0, "out of luck");
                grads
            })?;
            buckets.sync(&model, &mut GradientsParams::from_grads(grads, &model))?;
        }
        Ok::<_, FsepError>(())
    });
    let errors: Vec<_> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert!(errors[0].contains("rank 1 failed"), "{errors:?}");
    assert!(errors[1].contains("out of luck"), "{errors:?}");
}
