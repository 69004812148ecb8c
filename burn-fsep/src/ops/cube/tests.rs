//! The kernels against the default bodies.

use std::time::Instant;

use burn::{
    backend::{
        CubeDevice,
        ops::{FloatTensorOps, IntTensorOps},
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{FloatDType, TensorData, read_sync},
};
use burn_cubecl::CubeBackend;

use super::super::{
    ExpertActivation, FsepDeviceOps, FsepKernels, activation, assignment_order::AssignmentOrder, combine,
    device_ops::top_k_of, types::RowIndices,
};

type B = CubeBackend;

/// The first NVIDIA GPU where CUDA is built in and there is one, else what wgpu takes for the best, if that is built in.
fn device() -> CubeDevice {
    find_device().expect("the test asked whether there is one")
}

fn find_device() -> Option<CubeDevice> {
    #[cfg(feature = "cuda")]
    let cuda = burn::tensor::Device::enumerate(burn::tensor::DeviceType::Cuda).into_iter().next();
    #[cfg(not(feature = "cuda"))]
    let cuda: Option<burn::tensor::Device> = None;
    #[cfg(any(feature = "vulkan", feature = "webgpu"))]
    let found = cuda.or_else(|| Some(burn::tensor::Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)));
    #[cfg(not(any(feature = "vulkan", feature = "webgpu")))]
    let found = cuda;
    match found?.as_dispatch() {
        burn::backend::DispatchDevice::Cube(device) => Some(device.clone()),
        other => panic!("{other:?} is none of CubeCL's"),
    }
}

/// Whether there is a device to test on. Without one a test passes, and says so.
fn has_device() -> bool {
    let found = find_device().is_some();
    if !found {
        eprintln!("skipped: there is no GPU");
    }
    found
}

fn ints(values: &[i32]) -> IntTensor<B> {
    B::int_from_data(TensorData::new(values.to_vec(), [values.len()]), &device())
}

fn floats(values: Vec<f32>, dims: [usize; 2]) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(values, dims), &device())
}

/// Numbers between -2 and 2 that nothing repeats.
fn waves(rows: usize, width: usize, phase: f32) -> FloatTensor<B> {
    floats((0..rows * width).map(|i| 2.0 * (i as f32 * 0.37 + phase).sin()).collect(), [rows, width])
}

fn read_ints(tensor: IntTensor<B>) -> Vec<i64> {
    read_sync(B::int_into_data(tensor)).unwrap().iter::<i64>().collect()
}

fn read_floats(tensor: FloatTensor<B>) -> Vec<f32> {
    read_sync(B::float_into_data(tensor)).unwrap().iter::<f32>().collect()
}

/// The largest difference, relative to the largest expected number.
fn assert_close(what: &str, actual: FloatTensor<B>, expected: FloatTensor<B>, tolerance: f32) {
    let (actual, expected) = (read_floats(actual), read_floats(expected));
    assert_eq!(actual.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let difference = actual.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    assert!(difference <= tolerance * largest, "{what}: {difference} of {largest}");
}

#[test]
fn assignments_are_sorted_as_on_the_host() {
    if !has_device() {
        return;
    }
    // Without any, within a tile, beyond one, experts that are none, and more groups than shared memory has numbers.
    for (assignments, experts, topk) in
        [(0, 4, 2), (1, 1, 1), (96, 4, 2), (1024, 8, 1), (5000, 61, 4), (4096, 700, 8), (1500, 20_000, 4)]
    {
        let chosen: Vec<i32> = (0..assignments)
            .map(|i| match i * 7919 % 101 {
                0 => experts as i32,
                1 => -1,
                2 => i32::MAX,
                other => (other * other + i / 3) % experts as i32,
            })
            .collect();
        let (row_of, assignment_of, token_of, ends) = B::fsep_sort_assignments(ints(&chosen), experts, topk);
        let wide: Vec<i64> = chosen.iter().map(|&expert| expert.into()).collect();
        let expected = AssignmentOrder::new(&wide, experts);
        let as_ints = |values: Vec<usize>| values.into_iter().map(|value| value as i64).collect::<Vec<_>>();
        let tokens = expected.assignment_of.iter().map(|assignment| assignment / topk).collect();
        assert_eq!(read_ints(ends), as_ints(expected.ends), "{assignments} assignments, {experts} experts");
        assert_eq!(read_ints(row_of), as_ints(expected.row_of));
        assert_eq!(read_ints(assignment_of), as_ints(expected.assignment_of));
        assert_eq!(read_ints(token_of), as_ints(tokens));
    }
}

#[test]
fn the_top_k_are_those_of_the_host() {
    if !has_device() {
        return;
    }
    let special = [
        f32::NAN,
        -0.0,
        0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        -1.5,
        1e-42,
        -1e-42,
        f32::MAX,
        f32::MIN,
        2.0,
        -f32::NAN,
    ];
    for (rows, width, topk) in [(0, 4, 2), (1, 1, 1), (7, 12, 12), (300, 64, 8), (33, 130, 5)] {
        // Many are equal.
        let numbers: Vec<f32> = (0..rows * width)
            .map(|i| if i % 3 == 0 { special[i * 31 % special.len()] } else { (i * 53 % 9) as f32 - 4.0 })
            .collect();
        let chosen = read_ints(B::fsep_top_k(floats(numbers.clone(), [rows, width]), topk));
        let expected: Vec<i64> = numbers.chunks(width).flat_map(|row| top_k_of(row, topk)).collect();
        assert_eq!(chosen, expected, "{rows} rows of {width}");
    }
}

const ACTIVATIONS: [ExpertActivation; 5] = [
    ExpertActivation::SwiGlu,
    ExpertActivation::ClampedSwiGlu { alpha: 1.702, limit: 1.25 },
    ExpertActivation::Geglu,
    ExpertActivation::Gelu,
    ExpertActivation::ReluSquared,
];

#[test]
fn activations_are_those_of_the_default_bodies() {
    if !has_device() {
        return;
    }
    for activation in ACTIVATIONS {
        for (rows, ffn) in [(1, 1), (13, 7), (64, 96)] {
            let width = if activation.is_gated() { 2 * ffn } else { ffn };
            let (first, grad) = (waves(rows, width, 0.1), waves(rows, ffn, 0.7));
            let actual = B::fsep_activate(activation, first.clone());
            assert_close("forward", actual, activation::activate::<B>(activation, first.clone()), 1e-6);
            let (d_first, output) = B::fsep_activate_backward(activation, first.clone(), grad.clone());
            let expected = activation::activate_backward::<B>(activation, first, grad);
            assert_close("gradient", d_first, expected.0, 2e-6);
            assert_close("activation in backward", output, expected.1, 1e-6);
        }
    }
}

/// Gradients that are there, for [`FsepKernels`].
fn indices(experts: &[i32], topk: usize) -> RowIndices<B> {
    let (row_of, assignment_of, token_of, _) = B::fsep_sort_assignments(ints(experts), 8, topk);
    RowIndices { row_of, assignment_of, token_of }
}

#[test]
fn combinations_are_those_of_the_default_bodies() {
    if !has_device() {
        return;
    }
    for (tokens, topk, width) in [(0, 2, 5), (1, 1, 1), (9, 3, 7), (40, 2, 300)] {
        let experts: Vec<i32> = (0..tokens * topk).map(|i| (i * 5 % 8) as i32).collect();
        let indices = indices(&experts, topk);
        let (rows, probs) = (waves(tokens * topk, width, 0.2), waves(tokens, topk, 0.9));
        let grad = waves(tokens, width, 0.4);
        // SAFETY: sorting gives a permutation of the rows.
        let (combined, gradients, summed) = unsafe {
            (
                B::fsep_combine(&rows, &indices.row_of, &probs).unwrap(),
                B::fsep_combine_backward(&grad, Some(&rows), &indices, &probs, true).unwrap(),
                B::fsep_sum_rows(&rows, &indices.row_of, topk).unwrap(),
            )
        };
        assert_close("forward", combined, combine::forward::<B>(&rows, &indices.row_of, &probs), 1e-6);
        assert_eq!(gradients.probs.as_ref().unwrap().meta.shape().dims(), [tokens, topk]);
        let expected = combine::backward::<B>(&grad, Some(&rows), &indices, &probs, true);
        assert_close("rows", gradients.rows.unwrap(), expected.rows.unwrap(), 1e-6);
        assert_close("weights", gradients.probs.unwrap(), expected.probs.unwrap(), 2e-6);
        // SAFETY: as above.
        let selected = unsafe { B::fsep_select_rows(grad.clone(), &indices.token_of) }.unwrap();
        assert_close("selection", selected, B::float_select(grad, 0, indices.token_of.clone()), 0.0);
        assert_close("sum", summed, combine::sum_rows::<B>(&rows, &indices.row_of, topk), 1e-6);
    }
}

#[test]
fn the_same_memory_is_known() {
    if !has_device() {
        return;
    }
    let a = waves(3, 4, 0.0);
    assert!(B::fsep_is_same(a.clone(), a.clone()));
    assert!(!B::fsep_is_same(a.clone(), waves(3, 4, 0.0)));
    assert!(!B::fsep_is_same(a.clone(), B::float_transpose(a.clone())));
    assert!(!B::fsep_is_same(a.clone(), B::float_add_scalar(a.clone(), 1.0.into())));
}

/// Times of kernels and default bodies in turns; on a GPU that is what this is for: `cargo test --release -p burn-fsep --features
/// webgpu --lib cube::tests::times -- --ignored --nocapture`.
#[test]
#[ignore = "timings are not tests"]
fn times() {
    if !has_device() {
        return;
    }
    let (tokens, topk, hidden, ffn, experts) = (4096, 2, 256, 512, 64);
    let chosen: Vec<i32> = (0..tokens * topk).map(|i| (i * 7919 % experts) as i32).collect();
    let indices = indices(&chosen.iter().map(|expert| expert % 8).collect::<Vec<_>>(), topk);
    let (rows, probs) = (waves(tokens * topk, hidden, 0.2), waves(tokens, topk, 0.9));
    let (grad, scores) = (waves(tokens, hidden, 0.4), waves(tokens, experts, 0.3));
    let (first, d_hidden) = (waves(tokens * topk, 2 * ffn, 0.1), waves(tokens * topk, ffn, 0.5));
    let swiglu = ExpertActivation::SwiGlu;
    let host_sort = || {
        let chosen: Vec<i64> = read_ints(ints(&chosen));
        let order = AssignmentOrder::new(&chosen, experts);
        let upload = |values: &[usize]| ints(&values.iter().map(|&value| value as i32).collect::<Vec<_>>());
        drop([upload(&order.row_of), upload(&order.assignment_of), upload(&order.assignment_of)]);
    };
    let host_top_k = || {
        let chosen: Vec<i32> =
            read_floats(scores.clone()).chunks(experts).flat_map(|row| top_k_of(row, topk)).map(|i| i as i32).collect();
        drop(ints(&chosen));
    };
    let experts_of = ints(&chosen);
    // SAFETY: sorting gives a permutation of the rows.
    let combined = || drop(unsafe { B::fsep_combine(&rows, &indices.row_of, &probs) });
    // SAFETY: as above.
    let combined_backward = || drop(unsafe { B::fsep_combine_backward(&grad, Some(&rows), &indices, &probs, true) });
    for (name, kernel, default) in [
        (
            "sort",
            &(|| drop(B::fsep_sort_assignments(experts_of.clone(), experts, topk))) as &dyn Fn(),
            &host_sort as &dyn Fn(),
        ),
        ("top-k", &|| drop(B::fsep_top_k(scores.clone(), topk)), &host_top_k),
        ("SwiGLU", &|| drop(B::fsep_activate(swiglu, first.clone())), &|| {
            drop(activation::activate::<B>(swiglu, first.clone()))
        }),
        ("SwiGLU, backward", &|| drop(B::fsep_activate_backward(swiglu, first.clone(), d_hidden.clone())), &|| {
            drop(activation::activate_backward::<B>(swiglu, first.clone(), d_hidden.clone()))
        }),
        ("combine", &combined, &|| drop(combine::forward::<B>(&rows, &indices.row_of, &probs))),
        ("combine, backward", &combined_backward, &|| {
            drop(combine::backward::<B>(&grad, Some(&rows), &indices, &probs, true))
        }),
    ] {
        let time = |run: &dyn Fn()| {
            let start = Instant::now();
            (0..10).for_each(|_| run());
            // Waits for what was queued before.
            read_floats(B::float_zeros([1].into(), &device(), FloatDType::F32));
            start.elapsed().as_secs_f64() * 100.0
        };
        let mut best = [f64::INFINITY; 2];
        for _ in 0..6 {
            best = [best[0].min(time(kernel)), best[1].min(time(default))];
        }
        println!("{name}: kernel {:.3} ms, default body {:.3} ms", best[0], best[1]);
    }
}
